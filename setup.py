"""Metadata, dependencies and extras of fedrobust."""

from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["onnx>=1.18,<2", "onnxruntime>=1.20,<2"]

setup(
    name="fedrobust",
    version="0.1.0",
    description="Private, robust and scalable federated learning on images, studied in numbers, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["fedrobust*", "experiments*"]),
    package_data={"fedrobust": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12,<0.13",
        "dm-haiku>=0.0.17,<0.1",
        "optax>=0.2.8,<0.3",
        "chex>=0.1.92,<0.2",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6",  # imported by tensorflow-datasets, which does not require it
        "pillow>=10",  # decodes the images of a prepared TFDS set without TensorFlow
        "dp-accounting>=0.6,<0.7",
        "orbax-checkpoint>=0.12,<0.13",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.6,<2",
        "scipy>=1.13,<2",
        "tyro>=1.0,<2",
        "rich>=13,<16",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "export": EXPORT,
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", *EXPORT],
        "dev": ["ruff>=0.14", "mypy>=1.15", "pre-commit>=4"],
        "bench": ["torch==2.13.*", "opacus>=1.6,<1.7", "jax-privacy>=2.0,<2.1"],
        "attacks": [
            "torch==2.13.*",
            "torchvision==0.28.*",
            "torchattacks==3.5.1",
            "foolbox==3.3.4",
            "adversarial-robustness-toolbox==1.20.1",
            "pyautoattack==0.2.0",
        ],
        "tfds": ["tensorflow-cpu>=2.20,<3; sys_platform == 'linux'", "tensorflow>=2.20,<3; sys_platform != 'linux'"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
