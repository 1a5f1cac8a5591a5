"""`metarun explain`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.changes import changed
from metarun.config.trained import EvalConfig, ExplainConfig
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="explain")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once."""
    return job(run)(cfg)


def run(config: ExplainConfig, directory: str | Path) -> float:
    """Draw a task.

    Returns:
        The score of its queries; NaN where the class of none is known.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.inference.explain import explain, names_of_run, task_of_folder, task_of_run
    from metarun.inference.explain_sheet import left_out, letter, write
    from metarun.inference.support import list_queries, list_support
    from metarun.inference.trained import load
    from metarun.system.lifetime import collect_from_here
    from metarun.training.evaluation import format_score

    collect_from_here()
    asked = EvalConfig(
        config.ckpt,
        device=config.device,
        algo=config.algo,
        backbone=config.backbone,
        data=config.data,
    )
    paths, listing = [], None
    if config.support is not None:
        paths, listing = list_queries(config.query), list_support(Path(config.support))
    trained = load(
        config.ckpt,
        config.device,
        None if listing is None else len(listing.class_names),
        lambda own: changed(own, asked),
        with_data=listing is None,
    )
    if listing is None:
        task = task_of_run(trained, config.split, config.episode)
        found = explain(trained, task, names_of_run(trained, config.split, config.episode))
        what = f"{config.split} task {config.episode}"
    else:
        task = task_of_folder(trained, listing, paths, config.data.skip_unreadable)
        found = explain(trained, task, listing.class_names)
        what = f"{config.support}, {len(task.query_y)} queries"
    if found.legend:
        print(", ".join(f"{letter(label)} {name}" for label, name in found.legend.items()))
    if listing is not None and (why := trained.predict_together) is not None:
        print(f"a prediction depends on the other queries: {why}")
    if (part := left_out(found)) is not None:
        print(part)
    write(Path(config.out), found, trained)
    name, steps = trained.setup.objective.score_name, len(found.losses) - 1
    known = int(found.known.sum())
    told = "no query lies in a folder named as a class"
    if known:
        score = format_score(name, float(found.scores[-1]))
        of = "" if known == len(found.known) else f" (of {known} of known class)"
        told = f"{name} {score}, loss {float(found.losses[-1]):.4f}{of}"
    after = f", after {steps} inner steps" if trained.algorithm.has_inner_loop else ""
    print(f"{what}: {told}{after}; batch norm: {trained.setup.batch_norm}")
    print(f"written to {config.out}")
    return float(found.scores[-1])
