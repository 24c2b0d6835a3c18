"""What `build_cfg` works out and adds as `cfg.runtime`; never set by hand."""

from dataclasses import dataclass


@dataclass
class RuntimeConfig:
    """All paths are absolute."""

    seed: int
    project_root: str
    output_root: str
    log_dir: str
    ckpt_dir: str
    timestamp: str  # YYYYMMDD-HHMMSS, local time of the launch
    run_id: str  # run-<timestamp>-s<seed>
    data_name: str
    model_name: str
    training_name: str
