"""Packaging of `opd_ops` (what a user imports) and `opd_kernels` (its Triton kernels): honest ranges, no pins.

Not here: what only developers need (`[dependency-groups]` of pyproject.toml), the exact versions that the project's own
virtual environment uses (constraints.txt), tool settings (pyproject.toml).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "opd_ops" / "__init__.py").read_text())[1]

setup(
    name="opd-ops",
    version=VERSION,
    description="Selective on-policy distillation: exact token statistics, selection and reverse KL in bounded memory",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="knowledge-distillation, on-policy-distillation, language-models, token-selection, kl-divergence, triton, pytorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={
        "Paper, teachability": "https://arxiv.org/abs/2605.26844",
        "Paper, entropy and divergence": "https://arxiv.org/abs/2604.14084",
    },
    python_requires=">=3.10",
    packages=[*find_packages(include=["opd_ops", "opd_ops.*"]), "opd_kernels"],
    package_dir={"opd_kernels": "kernels/opd_kernels"},
    package_data={"opd_ops": ["py.typed"]},
    install_requires=["torch>=2.8"],
    entry_points={"console_scripts": ["opd-train = opd_ops.trainer.cli:main", "opd-inspect = opd_ops.diagnostics.cli:main"]},
    extras_require={
        "triton": ["triton>=3.6"],
        "demo": ["transformers>=5.0", "accelerate>=1.10", "gguf>=0.17", "matplotlib>=3.8", "rich>=13"],
        "train": [
            "transformers>=5.19",
            "accelerate>=1.10",
            "peft>=0.19",
            "datasets>=4.0",
            "gguf>=0.17",
            "safetensors>=0.5",
            "pyyaml>=6",
            "rich>=13",
        ],
        "inspect": ["transformers>=5.19", "accelerate>=1.10", "peft>=0.19", "gguf>=0.17", "matplotlib>=3.8", "rich>=13"],
        "trl": ["trl>=1.16,<1.17"],
        "hf": ["transformers>=5.19", "accelerate>=1.10"],
    },
)
