from setuptools import setup

setup(
    name="allo-fast",
    version="0.1.0",
    description="ALLO: align a language model by training a few percent of its weights",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ is a source root, not a package: a top-level `kernels` would shadow the PyPI package of that name.
    packages=["allo_fast", "allo_fast.data", "allo_fast.stages", "allo_kernels"],
    package_dir={"allo_fast": "allo_fast", "allo_kernels": "kernels/allo_kernels"},
    package_data={"allo_fast": ["report.css"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "rapidfuzz>=3.9",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19", "accelerate>=1.10"],
        "gguf": ["gguf>=0.17", "accelerate>=1.10"],
        "hub": ["datasets>=4.0"],
        "flash-attn": ["flash-attn>=2.8"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.15", "accelerate>=1.10"],
    },
    entry_points={"console_scripts": ["allo-fast = allo_fast.__main__:main"]},
)
