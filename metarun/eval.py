import hydra
from omegaconf import DictConfig
from metarun.compose import to_config
@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="eval")
def main(cfg: DictConfig) -> float | None:
    print(to_config(cfg))
