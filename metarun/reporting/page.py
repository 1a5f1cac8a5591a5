"""The HTML page of a report: one file that needs no network and runs no script but its own.

All text is escaped by Jinja, pictures are images (whose scripts browsers do not run), and a
content security policy allows nothing else.
"""

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from metarun import __version__
from metarun.reporting.calibrations import NOTE as OF_CALIBRATION
from metarun.reporting.comparison_table import NOTE
from metarun.reporting.confusions import NOTE as OF_CONFUSION
from metarun.reporting.content import ORDER, Report
from metarun.reporting.table import numeric_columns


def render(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("metarun.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.globals["numeric_columns"] = numeric_columns
    script = files("metarun.reporting").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("page.html")
    return template.render(
        report=report,
        order=ORDER,
        note=NOTE,
        of_calibration=OF_CALIBRATION,
        of_confusion=OF_CONFUSION,
        script=script,
        script_digest=digest,
        version=__version__,
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
