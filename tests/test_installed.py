# SPDX-License-Identifier: Apache-2.0
"""Versions by the names that modules and distributions really have, on a path made for the test."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from frozen_peft.context.kernels import table as kernel_table
from frozen_peft.context.store import fingerprint
from frozen_peft.training.engines import describe_machine
from frozen_peft.utils import installed
from tests.tiny_models import tiny_model

KERNELS = {"flash-linear-attention", "fla-core", "causal-conv1d", "mamba-ssm", "triton", "triton-windows"}


def is_in(distribution: importlib.metadata.Distribution, folder: Path) -> bool:
    return Path(str(distribution.locate_file(""))) == folder


class Site:
    """A folder on the path, in which packages are installed as pip leaves them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def module(self, name: str, text: str = "", file: str = "__init__.py") -> None:
        (self.folder / name).mkdir(exist_ok=True)
        for each in ("__init__.py", file):
            (self.folder / name / each).touch()
        # Not to be imported: flash-linear-attention cannot be, without a GPU.
        (self.folder / name / file).write_text(f"{text}\nraise ImportError\n")
        self.forget()

    def distribution(self, name: str, version: str | None, *modules: str) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        if version is not None:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        # A wheel lists its files; one that is installed in place lists none of its modules.
        (info / "RECORD").write_text("".join(f"{module}/__init__.py,,\n" for module in modules))
        self.forget()

    @staticmethod
    def forget() -> None:
        for cached in (installed.installed_version, installed.module_versions, installed._distributions):
            cached.cache_clear()
        kernel_table._version_of.cache_clear()
        kernel_table.current_capabilities.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    everywhere = importlib.metadata.distributions

    def without_kernels(**context: Any) -> Iterator[importlib.metadata.Distribution]:
        """What this machine has of them, such as Triton beside PyTorch for CUDA, is not what is tested."""
        for each in everywhere(**context):
            if each.read_text("METADATA") is None or each.metadata["Name"] not in KERNELS or is_in(each, tmp_path):
                yield each

    monkeypatch.setattr(importlib.metadata, "distributions", without_kernels)
    made = Site(tmp_path)
    made.forget()
    yield made
    monkeypatch.undo()
    made.forget()


def run_fingerprint() -> str:
    """Of a model that is elsewhere than on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        # Which the device that stands for it does not know.
        patch.setattr(torch, "is_autocast_enabled", lambda device: False)
        return fingerprint.run_fingerprint(tiny_model("llama").to("meta"))


def with_kernels(site: Site, fla: str = "0.6.0", core: str = "0.6.0") -> None:
    """What `pip install frozen-peft[cuda]` installs."""
    site.module("fla")
    site.distribution("flash-linear-attention", fla, "fla")
    site.distribution("fla-core", core, "fla")
    site.module("causal_conv1d")
    site.distribution("causal-conv1d", "1.5.2", "causal_conv1d")


def test_the_fingerprint_of_a_model_elsewhere_than_on_the_cpu_names_its_kernels(site: Site) -> None:
    without = run_fingerprint()
    with_kernels(site)
    both = run_fingerprint()
    (site.folder / "fla_core-0.6.0.dist-info" / "METADATA").write_text("Name: fla-core\nVersion: 0.6.1\n")
    site.forget()
    assert len({without, both, run_fingerprint()}) == 3


@pytest.mark.parametrize(("fla", "core", "oldest"), [("0.6.0", "0.6.0", "0.6.0"), ("0.6.1", "0.5.0", "0.5.0")])
def test_kernels_are_as_old_as_the_oldest_of_their_parts(fla: str, core: str, oldest: str, site: Site) -> None:
    with_kernels(site, fla, core)
    found = kernel_table.current_capabilities(torch.device("cpu"))
    assert (found.fla, found.causal_conv1d, found.mamba_ssm) == (Version(oldest), Version("1.5.2"), None)
    here = describe_machine(torch.device("cpu"), torch.float32)
    assert here["fla"] == f"fla-core {core}, flash-linear-attention {fla}"
    assert here["mamba_ssm"] == "not installed"


def test_a_part_of_it_alone_is_found(site: Site) -> None:
    site.module("fla")
    site.distribution("fla-core", "0.6.0", "fla")
    assert installed.module_versions("fla") == {"fla-core": "0.6.0"}
    assert installed.installed_version("flash-linear-attention") == "0.6.0"


def test_a_distribution_of_another_name(site: Site) -> None:
    site.module("triton")
    site.distribution("triton-windows", "3.5.0", "triton")
    assert installed.module_versions("triton") == {"triton-windows": "3.5.0"}


def test_a_package_that_is_known_by_its_module_alone(site: Site) -> None:
    site.module("some_kernels")
    site.distribution("some-kernels-windows", "3.5.0", "some_kernels")
    assert installed.installed_version("some-kernels") == "3.5.0"


def test_an_installation_in_place_is_found_by_its_usual_name(site: Site) -> None:
    for module, distribution in (("fla", "flash-linear-attention"), ("causal_conv1d", "causal-conv1d")):
        site.module(module)
        site.distribution(distribution, "0.7.0")
        assert installed.module_versions(module) == {distribution: "0.7.0"}


@pytest.mark.parametrize(
    ("text", "file", "version"),
    [
        ('__version__ = "1.6.0"', "__init__.py", "1.6.0"),
        ("__version__: str = '1.6.0'", "version.py", "1.6.0"),
        ("from elsewhere import __version__", "__init__.py", "unknown"),
    ],
)
def test_a_source_folder_without_metadata_says_its_version_itself(
    text: str, file: str, version: str, site: Site
) -> None:
    site.module("causal_conv1d", text, file)
    assert installed.module_versions("causal_conv1d") == {"causal_conv1d": version}
    assert installed.installed_version("causal-conv1d") == version
    found = kernel_table.current_capabilities(torch.device("cpu")).causal_conv1d
    assert found == Version("9999" if version == "unknown" else version)
    assert run_fingerprint()


def test_damaged_metadata_is_as_good_as_none(site: Site) -> None:
    """What an interrupted installation leaves behind."""
    site.module("fla", '__version__ = "0.6.0"')
    site.distribution("flash-linear-attention", None, "fla")
    assert installed.module_versions("fla") == {"fla": "0.6.0"}
    assert kernel_table.current_capabilities(torch.device("cpu")).fla == Version("0.6.0")


def test_what_is_not_there_has_no_version(site: Site) -> None:
    assert installed.module_versions("mamba_ssm") == {}
    assert installed.installed_version("mamba-ssm") is None


def test_a_folder_of_that_name_is_no_package(site: Site) -> None:
    """What is left where a repository was cloned beside a script."""
    (site.folder / "fla").mkdir()
    (site.folder / "fla" / "README.md").touch()
    site.forget()
    assert importlib.util.find_spec("fla") is not None
    assert installed.module_versions("fla") == {}
    assert kernel_table.current_capabilities(torch.device("cpu")).fla is None
