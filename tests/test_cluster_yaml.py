"""The launcher's files, cluster.yaml and clusters/on-premises.yaml, against Ray's own schema, offline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
FILES = ["cluster.yaml", "clusters/on-premises.yaml"]
Config = dict[str, Any]


def validated(config: Config) -> Config:
    """The config as ``ray up`` would use it: defaults filled in, then checked."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def read(name: str) -> Config:
    config: Config = yaml.safe_load((ROOT / name).read_text())
    return config


@pytest.fixture
def cluster() -> Config:
    return read("cluster.yaml")


def test_ray_accepts_it_and_workers_scale_from_zero(cluster: Config) -> None:
    prepared = validated(cluster)
    gpu = prepared["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert prepared["available_node_types"][prepared["head_node_type"]]["max_workers"] == 0


def test_machines_of_ones_own_are_all_taken() -> None:
    config = read("clusters/on-premises.yaml")
    prepared = validated(config)
    machines = len(config["provider"]["worker_ips"])
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"], prepared["max_workers"]) == (machines, machines, machines)
    # documentation's own addresses (RFC 5737), so that nobody's machine is taken by mistake
    assert all(ip.startswith("192.0.2.") for ip in [config["provider"]["head_ip"], *config["provider"]["worker_ips"]])


@pytest.mark.parametrize("name", FILES)
def test_no_command_of_rays_defaults_is_left(name: str) -> None:
    """Ray's AWS defaults download a nightly Ray; ours must replace them on head and worker."""
    prepared = validated(read(name))
    for key in ("head_setup_commands", "worker_setup_commands"):
        commands = [*prepared["setup_commands"], *prepared[key]]
        assert any("/home/ray/exsim" in command for command in commands)
        assert not any("://" in command for command in commands)


@pytest.mark.parametrize("name", FILES)
def test_it_runs_the_ray_that_is_pinned(name: str) -> None:
    """Every node's image, the constraints and the driver's Ray are one version."""
    docker = read(name)["docker"]
    images = [docker[key] for key in ("image", "head_image", "worker_image") if key in docker]
    assert images
    assert all(image.startswith(f"rayproject/ray:{version('ray')}-py311-") for image in images)
    assert f"ray=={version('ray')}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("name", FILES)
def test_every_node_demands_the_token(name: str) -> None:
    config = read(name)
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    (path,) = [option.partition("=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert config["file_mounts"][path] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", FILES)
def test_every_mounted_file_of_the_checkout_exists(name: str) -> None:
    local = [path for path in read(name)["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert [path for path in local if not (ROOT / path).exists()] == []


def misspelt_key(config: Config) -> None:
    config["idle_timeout_minuts"] = config.pop("idle_timeout_minutes")


def misspelt_node_key(config: Config) -> None:
    config["available_node_types"]["gpu"]["min_worker"] = 0


def fraction_of_a_gpu(config: Config) -> None:
    config["available_node_types"]["gpu"]["resources"] = {"GPU": 0.5}


@pytest.mark.parametrize("spoil", [misspelt_key, misspelt_node_key, fraction_of_a_gpu])
def test_a_mistake_is_refused(cluster: Config, spoil: Callable[[Config], None]) -> None:
    spoil(cluster)
    with pytest.raises(jsonschema.ValidationError):
        validated(cluster)


def test_a_misspelt_key_of_the_machines_file_is_refused() -> None:
    config = read("clusters/on-premises.yaml")
    misspelt_key(config)
    with pytest.raises(jsonschema.ValidationError):
        validated(config)


def test_machines_without_addresses_are_refused() -> None:
    config = read("clusters/on-premises.yaml")
    del config["provider"]["worker_ips"]
    with pytest.raises(Exception, match="worker_ips"):
        validated(config)


def test_an_unknown_head_node_type_is_refused(cluster: Config) -> None:
    cluster["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        validated(cluster)
