"""A plan as Kubernetes manifests: a ConfigMap with the plan and a JobSet (jobset.x-k8s.io/v1alpha2) that trains it.

In: an `ExportJob`. Out: YAML for kubectl apply. One pod per node runs torchrun; pods find the first by its stable name.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from meshwright.export.job import Exported, ExportJob

IMAGE, CLAIM, PORT = "meshwright:latest", "training-data", 29400
LONGEST_NAME = 40


class _Dumper(yaml.SafeDumper):
    """Texts of several lines are written as blocks, so that the plan stays readable."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return yaml.ScalarNode("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def kubernetes(job: ExportJob) -> Exported:
    """The two documents."""
    name = re.sub(r"[^a-z0-9]+", "-", f"train-{job.model.name}".lower())[:LONGEST_NAME].strip("-")
    documents = (_config_map(job, name), _job_set(job, name))
    text = "---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents)
    notes = (
        f"image {IMAGE!r} must hold meshwright[runtime], claim {CLAIM!r} the data; the JobSet controller must run",
    )
    return Exported(f"# {job.heading}\n{text}", notes)


def _config_map(job: ExportJob, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"plan.yaml": job.plan.to_yaml()},
    }


def _job_set(job: ExportJob, name: str) -> dict[str, Any]:
    nodes, gpus = job.cluster.nodes, job.cluster.gpus_per_node
    resource = "amd.com/gpu" if job.cluster.accelerator.name.startswith("mi") else "nvidia.com/gpu"
    command = [
        "torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(gpus), "--rdzv-id", name, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{name}-node-0-0.{name}:{PORT}",
        "-m", "meshwright", "train", "/plan/plan.yaml", "--data", "/data",
    ]  # fmt: skip
    container = {
        "name": "train",
        "image": IMAGE,
        "command": command,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {resource: gpus}},
        "volumeMounts": [
            {"name": "plan", "mountPath": "/plan", "readOnly": True},
            {"name": "data", "mountPath": "/data"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {"name": "plan", "configMap": {"name": name}},
        {"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    template = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {"maxRestarts": 3},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": template}}],
        },
    }
