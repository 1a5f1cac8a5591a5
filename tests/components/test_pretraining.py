"""Methods that learn an ordinary classifier first: what they say, and their oracles."""

from tests.conftest import Metarun

RUN = (
    "train", "data=glyphs", "backbone.width=3", "trainer.steps=2", "trainer.meta_batch=2",
    "trainer.eval_episodes=2", "trainer.test_episodes=2", "task.query=2", "task.way=3",
    "hydra.run.dir=run",
)  # fmt: skip


def test_a_run_says_what_its_training_accuracy_is_over(metarun: Metarun) -> None:
    said = metarun(*RUN, "algo=baseline", "algo.eval_inner_steps=2").stderr
    assert "its accuracy is over all 636 training classes, that of validation and test over" in said
    assert "over the 3 of a task" in said
    assert "plain batches" not in metarun(*RUN, "hydra.run.dir=maml").stderr
