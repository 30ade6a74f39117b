"""The machine is described, with or without nvidia-smi."""

import json
import os

from experiments.gpu import gpu_environment
from experiments.gpu.gpu_environment import SMI, main


def test_a_cpu_is_described(tmp_path, environment, capsys):
    os.environ["XLA_ANYTHING"] = "1"
    out = tmp_path / "environment.json"
    assert main(["--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["machine"]["platform"] == "cpu"
    assert found["device_memory_bytes"] is None
    assert found["nvidia_smi"] == []
    assert found["variables"]["XLA_ANYTHING"] == "1"
    assert found["packages"]["jax"] == found["machine"]["jax"]
    assert not {"PATH", "HOME"} & found["variables"].keys()


def test_nvidia_smi_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    line = ", ".join(f"value of {name}" for name in SMI)
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # Before it can be run, it is as if it were missing.
    assert gpu_environment.nvidia_smi() == []
    program.chmod(0o755)
    assert gpu_environment.nvidia_smi() == [{name: f"value of {name}" for name in SMI}]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_environment.nvidia_smi() == []
