"""Packaging. The entry points are the registry: what a gin file can name, see `framework.config.registry`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("framework/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
if VERSION is None:
    raise SystemExit("setup.py: framework/__init__.py has no __version__")

PARTS = [
    # exploration
    "noise_endpoint = strategies.exploration.noise_endpoint",
    "causal_history_routing = strategies.exploration.causal_history_routing",
    # surrogates
    "nft = strategies.surrogates.nft",
    "gaussian_kernel = strategies.surrogates.gaussian_kernel",
    "transitions = strategies.surrogates.transitions",
    "gibbs_tve = strategies.surrogates.gibbs_tve",
    # regularizers
    "none = strategies.regularizers.none",
    "velocity_kl = strategies.regularizers.velocity_kl",
    "several = strategies.regularizers.several",
    "selective_kl = strategies.regularizers.selective_kl",
    "kernel_kl = strategies.regularizers.kernel_kl",
    "anchor_velocity = strategies.regularizers.anchor_velocity",
    "branch_kl = strategies.regularizers.branch_kl",
    # pre-training and distillation
    "teacher_forcing = strategies.distillation.teacher_forcing",
    "dmd = strategies.distillation.dmd",
    "student_history = strategies.distillation.student_history",
    "score_levels = strategies.distillation.score_levels",
    # rewards
    "shapes = rewards.shapes",
    "shapes_proxies = rewards.shapes_proxies",
    "composite = rewards.composite",
    "random_control = rewards.random_control",
    "function = rewards.function",
    "frame_sampling = rewards.frame_sampling",
    "videoalign = rewards.videoalign",
    "hpsv3 = rewards.hpsv3",
    "qwen2vl.RewardTokens = rewards.qwen2vl:RewardTokens",
    "qwen2vl.UnmergedLoRA = rewards.qwen2vl_loading:UnmergedLoRA",
    "encoders = rewards.encoders",
    "clip_score = rewards.clip_score",
    "aesthetic = rewards.aesthetic",
    "subject_consistency = rewards.subject_consistency",
    "optical_flow = rewards.optical_flow",
    "dynamic_degree = rewards.dynamic_degree",
    "warp_smoothness = rewards.warp_smoothness",
    "failure = rewards.failure",
    "caching = rewards.caching",
    "client = rewards.service.client",
    "worker = rewards.service.worker",
    "calling.Patience = rewards.service.calling:Patience",
    "serving.Limits = framework.serving.scoring:Limits",
    "serving.ProbeClip = framework.serving.service:ProbeClip",
    # generators
    "embedded = backbones.embedded.generator",
    "recache = backbones.recache",
    "history = backbones.history",
    "memory_bank = backbones.memory_bank",
    "recompute = backbones.recompute",
    "wan = backbones.wan.generator",
    "wan.WanRecipe = backbones.wan.recipes:WanRecipe",
    "wan.ReleasedLoRA = backbones.wan.recipes:ReleasedLoRA",
    # the papers' claims
    "claim.Claim = framework.claims:Claim",
    "claim.HeldOutDifference = framework.claims:HeldOutDifference",
    "miniature = benchmarks.claims",
    # the framework's own
    "adapters = framework.adapters",
    "advantages = framework.advantages",
    "control_advantages = framework.control_advantages",
    "anchored_advantages = framework.anchored_advantages",
    "block_weights = framework.block_weights",
    "evaluation.HeldOut = framework.evaluation:HeldOut",
    "distribution.Distribution = framework.distributed:Distribution",
    "kernels = framework.kernels",
    "mirrors = framework.reporting.mirrors",
    "nonfinite = framework.nonfinite",
    "optimization = framework.optimization",
    "pooling = framework.pooling",
    "precision = framework.precision",
    "raven_advantages = framework.raven_advantages",
    "reference = framework.reference",
    "optimization.AdamW = framework.optimization:AdamW",
    "scenes = framework.data.scenes",
    "timeline = framework.timeline",
    "schedules.FewStepSchedule = framework.schedules:FewStepSchedule",
    "controls.ShapesControls = framework.data.shapes_controls:ShapesControls",
    "world.PreferenceWorld = framework.data.shapes:PreferenceWorld",
]

SERVE = ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "httpx>=0.27,<1", "msgpack>=1.1,<2"]
"""What serving rewards needs."""

setup(
    name="armillary",
    version=VERSION.group(1),
    description="Preference alignment of streaming autoregressive video generators, in interchangeable parts",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=find_packages(
        include=[
            *("framework", "framework.*", "strategies", "strategies.*", "backbones", "backbones.*"),
            *("rewards", "rewards.*", "theory_checks", "theory_checks.*", "configs"),
            *("benchmarks", "benchmarks.*"),  # `armillary claims` measures with them
        ]
    ),
    include_package_data=False,
    package_data={"configs": ["*.gin", "**/*.gin"], "backbones.embedded": ["*.safetensors", "**/*.safetensors"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "diffusers>=0.42,<0.44",
        "transformers>=5,<6",
        "peft>=0.21,<0.23",
        "gin-config==0.5.*",
        "numpy>=2,<3",
        "einops>=0.8,<1",
        "safetensors>=0.6,<1",
        "huggingface-hub>=1,<3",
        "tensorboard>=2.18,<3",
        "av>=14,<19",
        "pillow>=11,<14",
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",
        "packaging>=24",
        "ftfy>=6.2,<7",
        "hypothesis>=6.120,<7",
        "pytest>=8,<10",
    ],
    extras_require={
        "flow": ["torchvision>=0.26,<0.29"],  # 0.26 … 0.28 are built for torch 2.11 … 2.13
        "wandb": ["wandb>=0.19,<1"],
        "serve": SERVE,
        "dev": [
            "build>=1.2,<2",
            "import-linter>=2.3,<3",
            "pyright>=1.1.400,<1.2",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<1",
            *SERVE,
        ],
    },
    entry_points={
        "console_scripts": ["armillary = framework.cli:main"],
        "armillary.parts": PARTS,
    },
)
