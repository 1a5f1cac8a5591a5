"""`metarun export`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.changes import changed
from metarun.config.trained import EvalConfig, EvalData, ExportConfig, PredictConfig
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="export")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once."""
    return job(run)(cfg)


def run(config: ExportConfig, directory: str | Path) -> float:
    """Write a trained run to a file that labels pictures without metarun.

    Returns:
        The largest difference between scores of the file and of the run.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.inference import export, export_file
    from metarun.inference.judgement import judge
    from metarun.inference.trained import load
    from metarun.system.lifetime import collect_from_here

    collect_from_here()
    out = Path(config.out)
    export_file.refuse_foreign(out)
    onnx = out.suffix.lower() == ".onnx"
    if onnx:
        export_file.refuse_without_onnx()
    asked = EvalConfig(config.ckpt, backbone=config.backbone, data=EvalData(config.data.root))
    trained = load(
        config.ckpt,
        "cpu",
        config.task.way,
        lambda own: export.of_a_program(changed(own, asked)),
        config.calibrate,
    )
    export.refuse_unexportable(trained, config.calibrate)
    calibrated = None
    if config.calibrate:
        task = trained.config.task
        way, shot = task.way, config.task.shot or task.shot
        tasks, usual = config.calibration_tasks, PredictConfig  # of sets, which no file has
        found = judge(trained, [shot] * way, tasks, usual.coverage, usual.false_alarms).calibration
        calibrated = export.Calibrated(found.temperature, tasks, way, shot)
    temperature = 1.0 if calibrated is None else calibrated.temperature
    about = export.about(trained, calibrated)
    program = export.program_of(trained, temperature)
    content, made = (export_file.as_onnx if onnx else export_file.as_pt2)(program, about)
    apart = export.check(trained, temperature, made)
    export_file.write(out, content)
    print(f"{trained.path}, after meta-step {trained.step}: {about['run']['algo']}")
    for name, what in (about["inputs"] | about["outputs"]).items():
        print(f"  {name}: {what}")
    if trained.inputs is not None:
        print(f"pictures, as in training: {trained.inputs}")
    print(f"batch norm: {trained.setup.batch_norm}")
    if calibrated is None:
        print("temperature 1: probabilities are the network's own; calibrate=true calibrates them")
    else:
        print(
            f"temperature {temperature:.3g}, of {calibrated.tasks} validation tasks, "
            f"{calibrated.way}-way {calibrated.shot}-shot"
        )
    if (why := trained.predict_together) is not None:
        print(f"a label depends on the other queries of its call: {why}")
    print(
        f"checked on {len(export.SHAPES)} tasks of noise: scores differ from the run's by "
        f"{apart:.1g} at most"
    )
    print(f"written to {out} ({len(content) / 2**20:.1f} MiB)")
    return apart
