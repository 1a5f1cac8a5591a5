"""`metarun explain`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.cli.changes import changed
from metarun.config.trained import EvalConfig, ExplainConfig
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="explain")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once."""
    return job(run)(cfg)


def run(config: ExplainConfig, directory: str | Path) -> float:
    """Draw a task.

    Returns:
        The score of its queries.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.inference.explain import explain, write
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
    trained = load(
        config.ckpt, config.device, change=lambda own: changed(own, asked), with_data=True
    )
    found = explain(trained, config.split, config.episode)
    write(Path(config.out), found, trained)
    name, steps = trained.setup.objective.score_name, len(found.losses) - 1
    score = format_score(name, float(found.scores[-1]))
    after = f", after {steps} inner steps" if trained.algorithm.has_inner_loop else ""
    print(
        f"{config.split} task {config.episode}: {name} {score}, loss {float(found.losses[-1]):.4f}"
        f"{after}; batch norm: {trained.setup.batch_norm}"
    )
    print(f"written to {config.out}")
    return float(found.scores[-1])
