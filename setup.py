import re
from pathlib import Path

from setuptools import setup

INIT = Path(__file__).parent / "allo_fast" / "__init__.py"

setup(
    name="allo-fast",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text())[1],
    description="ALLO: align a language model by training a few percent of its weights",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ is a source root, not a package: a top-level `kernels` would shadow the PyPI package of that name.
    packages=[
        "allo_fast",
        "allo_fast.compare",
        "allo_fast.data",
        "allo_fast.locating",
        "allo_fast.method",
        "allo_fast.model",
        "allo_fast.plan",
        "allo_fast.report",
        "allo_fast.runs",
        "allo_fast.stages",
        "allo_fast.training",
        "allo_kernels",
        "allo_kernels.tools",
    ],
    package_dir={"allo_fast": "allo_fast", "allo_kernels": "kernels/allo_kernels"},
    package_data={"allo_fast.report": ["report.css", "report.js"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.10",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "datasets>=4.0",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "rapidfuzz>=3.9",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "gguf": ["gguf>=0.17"],
        "flash-attn": ["flash-attn>=2.8"],
        "lora": ["peft>=0.18"],
        "math": ["math-verify>=0.9"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.19"],
        "test": [
            "tensorboard>=2.18",
            "pytest>=8,<9.2",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "trl>=1.16",
            "peft>=0.18",
            "math-verify>=0.9",
        ],
    },
    entry_points={"console_scripts": ["allo-fast = allo_fast.__main__:main"]},
)
