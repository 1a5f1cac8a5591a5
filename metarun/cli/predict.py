"""`metarun predict`."""

from collections import Counter
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.changes import changed
from metarun.config.trained import EvalConfig, EvalData, PredictConfig
from metarun.errors import ConfigError, printable_name
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="predict")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once."""
    return job(run)(cfg)


def run(config: PredictConfig, directory: str | Path) -> float:
    """Label pictures, print what was found and write the table.

    Returns:
        The mean probability of the labels.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.episodes.source import TooFew
    from metarun.inference import predict, table
    from metarun.inference.judgement import judge, queries_left
    from metarun.inference.sheet import MOST
    from metarun.inference.support import list_queries, list_support, read_support
    from metarun.inference.trained import load
    from metarun.system.lifetime import collect_from_here

    collect_from_here()
    out, skip = Path(config.out), config.data.skip_unreadable
    table.refuse_foreign(out)
    paths = list_queries(config.query)
    listing = list_support(Path(config.support))
    way = len(listing.class_names)
    asked = EvalConfig(
        config.ckpt,
        device=config.device,
        algo=config.algo,
        backbone=config.backbone,
        data=EvalData(config.data.root),
    )
    try:
        trained = load(
            config.ckpt, config.device, way, lambda own: changed(own, asked), config.calibrate
        )
    except ConfigError as error:
        if not (config.calibrate and isinstance(error.__cause__, TooFew)):
            raise
        raise ConfigError(f"calibrate=true, with tasks of {way} classes: {error}") from error
    if config.calibrate and not skip:  # of what cannot be read, nobody knows yet how much it is
        queries_left(trained, listing.sizes)
    support = read_support(listing, predict.inputs_of_run(trained), skip)
    for line in predict.conditions(trained, support):
        print(line)
    judgement = None
    if config.calibrate:
        counts = list(support.counts.values())
        judgement = judge(
            trained, counts, config.calibration_tasks, config.coverage, config.false_alarms
        )
    found = predict.label_pictures(
        trained,
        support,
        paths,
        judgement=judgement,
        batch=config.batch,
        skip_unreadable=skip,
        shown=0 if config.sheet is None else MOST,
    )
    given = Counter(found.labels)
    shown = ", ".join(f"{printable_name(name)} {given[name]}" for name in found.class_names)
    print(f"labelled {predict.so_many(len(found.paths))}: {shown}")
    for line in predict.trust(found, judgement):
        print(line)
    table.write_csv(out, found)
    written = [str(out)]
    if config.sheet is not None:
        table.write_sheet_of(Path(config.sheet), found)
        written.append(config.sheet)
    print(f"written to {', '.join(written)}")
    return float(found.probabilities.amax(1).mean())
