"""clusters/rayjob.yaml, offline, by three checks.

1. Every key is a documented one with a value of its type. The schema is written here by hand, after KubeRay's API
   reference (ray.io/v1, KubeRay 1.5) and Kubernetes' for the pods: the fields that the file uses and their neighbours.
   All others are refused, so that a typo is found; a right field that is new to the file has to be added below.
2. Ray's own reader of such clusters, the one that the autoscaler in the head's pod runs, derives the nodes' resources.
3. The entry point is parsed by the command line that it calls, and its preset exists.

What this does not check: the admission rules of a Kubernetes server, and whether image and volume are there.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from simulator.cli import exsim
from simulator.plan.settings_file import presets

ROOT = Path(__file__).parents[1]
Manifest = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, lt=65536)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]


class Strict(BaseModel):
    """No unknown key, and no number where text is wanted: Kubernetes refuses ``cpu: 4`` in an environment variable."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


# -- Kubernetes, the part in use ------------------------------------------------------------------------------------


class Env(Strict):
    name: Text
    value: str


class ContainerPort(Strict):
    containerPort: Port
    name: Annotated[str, Field(max_length=15)]


class Amounts(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]
    readOnly: bool = False


class Container(Strict):
    name: Name
    image: Text
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: list[Env] = []
    ports: list[ContainerPort] = []
    resources: Amounts
    volumeMounts: list[Mount] = []


class Claim(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim


class Toleration(Strict):
    key: Text
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSecurity(Strict):
    fsGroup: int


class Pod(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    tolerations: list[Toleration] = []
    securityContext: PodSecurity | None = None
    nodeSelector: dict[str, str] = {}


class PodTemplate(Strict):
    spec: Pod


class Storage(Strict):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]]
    resources: Storage
    storageClassName: str | None = None


class VolumeClaim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


# -- KubeRay ------------------------------------------------------------------------------------------------------


class HeadGroup(Strict):
    template: PodTemplate
    rayStartParams: dict[str, str]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: bool = False


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    idleTimeoutSeconds: Count | None = None
    numOfHosts: Annotated[int, Field(ge=1)] = 1
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None


class Cluster(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    suspend: bool = False


class SubmitterConfig(Strict):
    backoffLimit: Count


class JobSpec(Strict):
    entrypoint: Text
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    metadata: dict[str, str] = {}
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    backoffLimit: Count = 0
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    submitterConfig: SubmitterConfig | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    suspend: bool = False
    rayClusterSpec: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


@pytest.fixture
def manifests() -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "clusters" / "rayjob.yaml").read_text()))


@pytest.fixture
def job(manifests: list[Manifest]) -> RayJob:
    return RayJob.model_validate(manifests[1])


def pods(job: RayJob) -> list[Pod]:
    cluster = job.spec.rayClusterSpec
    return [cluster.headGroupSpec.template.spec, *(group.template.spec for group in cluster.workerGroupSpecs)]


def test_every_key_is_known(manifests: list[Manifest]) -> None:
    claim, job = manifests
    VolumeClaim.model_validate(claim)
    RayJob.model_validate(job)


def test_the_autoscaler_reads_gpu_workers_from_zero(manifests: list[Manifest]) -> None:
    cluster = {"metadata": {"name": "exsim", "namespace": "default"}, "spec": manifests[1]["spec"]["rayClusterSpec"]}
    derived = _derive_autoscaling_config_from_ray_cr(cluster)
    head, gpu = (derived["available_node_types"][name] for name in (derived["head_node_type"], "gpu"))
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0), head["max_workers"]) == (4, 0, 0)
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (4, 1)
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert derived["idle_timeout_minutes"] == 10


def test_the_entry_point_is_a_command_line_that_parses(job: RayJob) -> None:
    program, command, *arguments = shlex.split(job.spec.entrypoint)
    assert program == "exsim"
    parsed = exsim.commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    assert parsed["config"] in presets()
    # results go where the volume is, so that they outlive the pod
    (mount,) = pods(job)[0].containers[0].volumeMounts
    assert str(parsed["out"]).startswith(f"{mount.mountPath}/")


def test_a_second_try_does_not_meet_the_directory_of_the_first(job: RayJob) -> None:
    assert job.spec.submitterConfig is not None
    assert (job.spec.backoffLimit, job.spec.submitterConfig.backoffLimit) == (0, 0)


def test_mounts_have_volumes_and_the_volume_has_a_claim(manifests: list[Manifest], job: RayJob) -> None:
    for pod in pods(job):
        volumes = {volume.name: volume.persistentVolumeClaim.claimName for volume in pod.volumes}
        for container in pod.containers:
            assert {mount.name for mount in container.volumeMounts} == volumes.keys()
        assert set(volumes.values()) <= {manifests[0]["metadata"]["name"]}


def test_every_container_has_the_ray_and_the_python_that_are_pinned(job: RayJob) -> None:
    wanted = version("ray")
    assert f"ray=={wanted}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert job.spec.rayClusterSpec.rayVersion == wanted
    images = {container.image for pod in pods(job) for container in pod.containers}
    (image,) = images
    assert image.endswith(f":ray-{wanted}-py311")
    lines = (ROOT / "clusters" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM ")] == [f"FROM rayproject/ray:{wanted}-py311-gpu"]
    assert any(image in line for line in lines)


def test_the_image_holds_all_that_installing_needs() -> None:
    text = (ROOT / "clusters" / "Dockerfile").read_text()
    copied = [line.split()[2:-1] for line in text.splitlines() if line.startswith("COPY")]
    sources = {source for line in copied for source in line}
    assert {"simulator", "actors", "tuning", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_resources_are_whole_and_guaranteed(job: RayJob) -> None:
    """Requests equal limits, so that Kubernetes does not kill the pod for another's memory; GPUs are whole there, and
    it is Ray that shares them."""
    for pod in pods(job):
        for container in pod.containers:
            amounts = container.resources
            assert amounts.requests == amounts.limits
            assert all(amounts.limits[name].isdecimal() for name in amounts.limits if name != "memory")
    (worker,) = job.spec.rayClusterSpec.workerGroupSpecs
    assert worker.template.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    # GPU nodes are tainted, lest other pods take them
    assert [each.key for each in worker.template.spec.tolerations] == ["nvidia.com/gpu"]
    assert worker.minReplicas <= worker.replicas <= worker.maxReplicas


def misspelt_job_key(job: Manifest) -> None:
    job["spec"]["shutdownAfterJobFinish"] = job["spec"].pop("shutdownAfterJobFinishes")


def misspelt_group_key(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0


def number_for_text(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 1


def negative_count(job: Manifest) -> None:
    job["spec"]["backoffLimit"] = -1


def old_version(job: Manifest) -> None:
    job["apiVersion"] = "ray.io/v1alpha1"


@pytest.mark.parametrize("spoil", [misspelt_job_key, misspelt_group_key, number_for_text, negative_count, old_version])
def test_a_mistake_is_refused(manifests: list[Manifest], spoil: Callable[[Manifest], None]) -> None:
    job = copy.deepcopy(manifests[1])
    spoil(job)
    with pytest.raises(ValidationError):
        RayJob.model_validate(job)
