"""The manifests of `configs/deploy` for KubeRay: what is in them fits together, and the ranks fit in the workers."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.recipes import DEPLOY, LAST_WORDS_S, PINNED, parse_ray

from phalanx.configs.deploy import wait_for_ray
from phalanx.launcher.check import check
from phalanx.launcher.config import load_config
from phalanx.launcher.placement import Node, plan_placement
from phalanx.serve.health import PROBE_S

MANIFESTS = ("kuberay-raycluster.yaml", "kuberay-rayservice.yaml")


class Manifest(NamedTuple):
    """A file for Kubernetes. text: as it is. documents: its objects."""

    text: str
    documents: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        (document,) = self.all(kind)
        return document

    @property
    def cluster(self) -> dict[str, Any]:
        """What is asked of the Ray cluster."""
        services = self.all("RayService")
        spec: dict[str, Any] = services[0]["spec"]["rayClusterConfig"] if services else self.one("RayCluster")["spec"]
        return spec

    def pods(self) -> dict[str, dict[str, Any]]:
        """The pod specifications, by `head`, name of the worker group, or name of the Deployment."""
        pods = {"head": self.cluster["headGroupSpec"]["template"]["spec"]}
        pods |= {group["groupName"]: group["template"]["spec"] for group in self.cluster["workerGroupSpecs"]}
        return pods | {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in self.all("Deployment")}

    def secrets(self) -> dict[str, str]:
        """The Secrets that the file's head has one make, each with its only key."""
        return dict(re.findall(r"kubectl create secret generic (\S+) --from-file=(\S+?)=", self.text))

    def config_file(self, folder: Path) -> Path:
        """The configuration inside, as a file."""
        ((name, text),) = self.one("ConfigMap")["data"].items()
        path = folder / str(name)
        path.write_text(text)
        return path

    def shape(self) -> str:
        """The `--set` by which the file says that its configuration can be checked without the weights."""
        found = re.search(r"`phalanx check` of it with --set (model=shape:\S+)", self.text)
        assert found is not None
        return found.group(1)


@pytest.fixture(params=MANIFESTS)
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return read_manifest(request.param)


@pytest.fixture
def beside() -> Manifest:
    """The manifest with the server beside the cluster."""
    return read_manifest("kuberay-raycluster.yaml")


@pytest.fixture
def behind() -> Manifest:
    """The manifest with Ray Serve."""
    return read_manifest("kuberay-rayservice.yaml")


def read_manifest(name: str) -> Manifest:
    text = (DEPLOY / name).read_text()
    return Manifest(text, list(yaml.safe_load_all(text)))


def container(pod: Mapping[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


def names(manifest: Manifest, kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in manifest.all(kind)}


def mounted(pod: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The volume that holds `path` in a pod."""
    mounts = {Path(mount["mountPath"]): mount["name"] for mount in container(pod).get("volumeMounts", [])}
    (name,) = (name for folder, name in mounts.items() if Path(path).is_relative_to(folder))
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == name)
    assert isinstance(volume, dict)
    return volume


def script(pod: Mapping[str, Any]) -> list[list[str]]:
    """The commands of a container that runs a shell, each as its words."""
    shell, text = container(pod)["command"], container(pod)["args"][0]
    assert shell == ["/bin/sh", "-ec"]
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    lines = [shlex.split(line.strip(), comments=True) for line in re.split(r"[;\n]", text)]
    commands = ([word for word in line if word not in ("until", "do", "done", "exec")] for line in lines)
    return [command for command in commands if command]


def test_every_object_has_a_version_a_kind_and_a_name_of_its_own(manifest: Manifest) -> None:
    versions = {
        "ConfigMap": "v1",
        "PersistentVolumeClaim": "v1",
        "Service": "v1",
        "Deployment": "apps/v1",
        "RayCluster": "ray.io/v1",
        "RayService": "ray.io/v1",
    }
    names = [(document["kind"], document["metadata"]["name"]) for document in manifest.documents]
    assert len(set(names)) == len(names)
    assert all(document["apiVersion"] == versions[document["kind"]] for document in manifest.documents)


def replica_cpus(manifest: Manifest) -> float:
    """What Ray Serve's replica takes of a worker; 0 without Ray Serve."""
    services = manifest.all("RayService")
    if not services:
        return 0
    ((application,),) = yaml.safe_load(services[0]["spec"]["serveConfigV2"]).values()
    (deployment,) = application["deployments"]
    return float(deployment["ray_actor_options"]["num_cpus"])


def test_the_configuration_inside_is_good(manifest: Manifest, tmp_path: Path) -> None:
    report = check(manifest.config_file(tmp_path), [manifest.shape()])
    assert report.ok, report.errors
    assert report.plan is not None and report.plan.device == "cuda"


def test_the_workers_have_room_for_all_ranks_and_no_gpu_is_left_over(manifest: Manifest, tmp_path: Path) -> None:
    config = load_config(manifest.config_file(tmp_path))
    plan = check(manifest.config_file(tmp_path), [manifest.shape()]).plan
    assert plan is not None
    nodes = []
    for group in manifest.cluster["workerGroupSpecs"]:
        limits = container(group["template"]["spec"])["resources"]["limits"]
        held = {"CPU": float(limits["cpu"]) - replica_cpus(manifest), "GPU": float(limits["nvidia.com/gpu"])}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]  # the ranks are placed all at once
        for index in range(group["replicas"]):
            nodes.append(Node(f"{group['groupName']} {index}", f"10.0.0.{index}", "worker", held, held))
    plan_placement(plan.layout, {"CPU": plan.cpus_per_rank, "GPU": plan.gpus_per_rank}, nodes)
    assert sum(node.total["GPU"] for node in nodes) == config.parallel.num_ranks


def test_no_rank_and_no_replica_is_placed_on_the_head(manifest: Manifest) -> None:
    assert replica_cpus(manifest) > 0 or not manifest.all("RayService")
    assert manifest.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(manifest.pods()["head"])["resources"]["limits"]


def test_what_ray_takes_a_node_to_have_is_what_the_pod_is_sure_to_get(manifest: Manifest) -> None:
    for name in ("head", "gpu"):
        resources = container(manifest.pods()[name])["resources"]
        assert resources["requests"] == resources["limits"]


def test_every_mount_has_a_volume_every_volume_a_mount_and_a_source(manifest: Manifest) -> None:
    sources = {
        "configMap": {"name": names(manifest, "ConfigMap")},
        "secret": {"secretName": set(manifest.secrets())},
        "persistentVolumeClaim": {"claimName": names(manifest, "PersistentVolumeClaim")},
        "emptyDir": {"medium": {"Memory"}},
    }
    for pod in manifest.pods().values():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        mounts = [mount["name"] for mount in container(pod).get("volumeMounts", [])]
        assert sorted(volumes) == sorted(mounts)
        for volume in volumes.values():
            ((kind, source),) = ((key, value) for key, value in volume.items() if key != "name")
            assert all(source[key] in allowed for key, allowed in sources[kind].items()), volume


def test_ranks_and_server_find_the_model_where_the_configuration_says(manifest: Manifest, tmp_path: Path) -> None:
    config = load_config(manifest.config_file(tmp_path))
    for name in manifest.pods().keys() - {"head"}:
        assert "persistentVolumeClaim" in mounted(manifest.pods()[name], config.model.path)


def test_the_server_finds_the_keys_where_the_configuration_says(manifest: Manifest, tmp_path: Path) -> None:
    keys = load_config(manifest.config_file(tmp_path)).serve.api_keys
    assert keys is not None
    pod = manifest.pods()["phalanx-serve" if manifest.all("Deployment") else "gpu"]
    assert manifest.secrets()[mounted(pod, keys)["secret"]["secretName"]] == Path(keys).name


def test_connections_to_ray_need_a_token(manifest: Manifest) -> None:
    assert manifest.cluster["authOptions"] == {"mode": "token"}


def test_ray_is_of_the_version_in_the_image(manifest: Manifest) -> None:
    assert manifest.cluster["rayVersion"] == PINNED["ray"]


def test_all_pods_run_one_image_and_none_as_the_superuser(manifest: Manifest) -> None:
    pods = manifest.pods().values()
    assert len({container(pod)["image"] for pod in pods}) == 1
    assert all(pod["securityContext"] == {"runAsNonRoot": True} for pod in pods)


def test_the_service_leads_to_the_server_and_to_no_pod_of_ray(beside: Manifest) -> None:
    service, deployment = beside.one("Service")["spec"], beside.one("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert deployment["selector"]["matchLabels"] == labels
    assert not [label for label in labels if label.startswith("ray.io/")]  # KubeRay would take it for one of its pods
    groups = [beside.cluster["headGroupSpec"], *beside.cluster["workerGroupSpecs"]]
    assert not [group for group in groups if "labels" in group["template"].get("metadata", {})]


def test_probes_service_metrics_and_server_name_the_same_port(beside: Manifest) -> None:
    deployment = beside.one("Deployment")["spec"]
    serve = container(beside.pods()["phalanx-serve"])
    ports = {port["name"]: port["containerPort"] for port in serve["ports"]}
    command = script(beside.pods()["phalanx-serve"])[-1]
    named = [serve[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    named += [port["targetPort"] for port in beside.one("Service")["spec"]["ports"]]
    numbers = [deployment["template"]["metadata"]["annotations"]["prometheus.io/port"]]
    numbers.append(command[command.index("--port") + 1])
    assert {str(ports[name]) for name in named} == set(numbers)


def test_health_restarts_the_server_and_readiness_routes_to_it(beside: Manifest) -> None:
    serve = container(beside.pods()["phalanx-serve"])
    paths = [serve[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    assert paths == ["/health", "/health", "/ready"]


def test_a_probe_waits_longer_than_the_server_takes_to_find_out(beside: Manifest) -> None:
    serve = container(beside.pods()["phalanx-serve"])
    assert all(serve[f"{kind}Probe"]["timeoutSeconds"] > PROBE_S for kind in ("startup", "liveness", "readiness"))


def test_a_server_is_left_the_time_to_drain(beside: Manifest, tmp_path: Path) -> None:
    pod = beside.pods()["phalanx-serve"]
    name, seconds = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"
    drain_s = load_config(beside.config_file(tmp_path)).serve.drain_timeout_s
    assert pod["terminationGracePeriodSeconds"] >= float(seconds) + drain_s + LAST_WORDS_S


def test_a_replica_of_ray_serves_is_left_the_time_to_drain(behind: Manifest, tmp_path: Path) -> None:
    drain_s = load_config(behind.config_file(tmp_path)).serve.drain_timeout_s
    assert behind.pods()["gpu"]["terminationGracePeriodSeconds"] >= drain_s + LAST_WORDS_S


def test_a_new_server_waits_for_the_gpus_of_the_old(beside: Manifest) -> None:
    deployment = beside.one("Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")


def test_the_server_joins_ray_as_a_node_that_offers_nothing_and_waits_for_all_gpus(
    beside: Manifest, tmp_path: Path
) -> None:
    join, _, wait, serve = script(beside.pods()["phalanx-serve"])
    name = beside.one("RayCluster")["metadata"]["name"]
    head = {port["name"]: port["containerPort"] for port in container(beside.pods()["head"])["ports"]}
    options = parse_ray(join[1:])
    assert options["address"] == f"{name}-head-svc:{head['gcs-server']}"  # as KubeRay calls the head's Service
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0)
    config = load_config(beside.config_file(tmp_path))
    assert wait == f"python -m {wait_for_ray.__name__} --gpus {config.parallel.num_ranks}".split()
    assert config.cluster.ray == "auto"
    assert serve[:2] == ["phalanx", "serve"]
    (volume,) = (mounted(beside.pods()["phalanx-serve"], word) for word in serve if word.endswith(".yaml"))
    assert volume["configMap"]["name"] == beside.one("ConfigMap")["metadata"]["name"]
    assert Path(serve[2]).name in beside.one("ConfigMap")["data"]


def test_the_server_shows_ray_the_token_that_the_operator_keeps_for_the_cluster(beside: Manifest) -> None:
    environment = {each["name"]: each for each in container(beside.pods()["phalanx-serve"])["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": beside.one("RayCluster")["metadata"]["name"], "key": "auth_token"}


def test_ray_serve_is_told_of_an_application_that_there_is(behind: Manifest) -> None:
    settings = yaml.safe_load(behind.one("RayService")["spec"]["serveConfigV2"])
    (application,) = settings["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    for pod in behind.pods().values():  # any of them may be asked to build it
        volume = mounted(pod, application["args"]["config"])
        assert volume["configMap"]["name"] == behind.one("ConfigMap")["metadata"]["name"]
    assert Path(application["args"]["config"]).name in behind.one("ConfigMap")["data"]


def test_ray_serve_knows_every_setting_it_is_given(behind: Manifest) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs ray[serve]")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(behind.one("RayService")["spec"]["serveConfigV2"]))
