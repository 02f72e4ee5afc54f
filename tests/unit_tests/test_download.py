"""`python -m titan_video.download` against a small server with the hub's paths: whole, resumed, refused folders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from tests.helpers import ROOT
from titan_video import download

ID, COMMIT = "owner/Tiny-Diffusers", "0" * 39 + "1"
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"a": 1}',
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model.fp16.safetensors": WEIGHTS,
    "transformer_2/diffusion_pytorch_model.bf16.safetensors": WEIGHTS[:1000],
    "text_encoder/model.safetensors": WEIGHTS[:5000],
    "text_encoder/pytorch_model.bin": b"pickle",
    "tokenizer/spiece.model": b"\0\1",
    "README.md": b"words",
    "assets/x.json": b"{}",
    "other.safetensors": WEIGHTS,
}
WANTED = {
    name
    for name in FILES
    if name.split("/")[0] in (*download.PARTS, "model_index.json") and "fp16" not in name and not name.endswith("bin")
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does. `server` holds what differs from test to test."""

    def log_message(self, *args):
        pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if not (path.startswith(f"/api/models/{ID}") or path.startswith(f"/{ID}/")):
            return self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        if self.server.gated and self.headers.get("Authorization") != "Bearer right":
            return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
        if path.startswith("/api/"):
            if path != f"/api/models/{ID}/revision/main":
                return self.refuse(404, "RevisionNotFound")
            return self.send(json.dumps({"id": ID, "sha": COMMIT, "siblings": self.server.siblings}).encode(), {})
        name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/")
        etag = hashlib.sha256(FILES[name]).hexdigest()
        self.send(self.server.content.get(name, FILES[name]), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, name)

    do_HEAD = do_GET

    def send(self, data, headers, name=""):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        for key, value in {"Content-Length": len(data) - start, "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, str(value))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(
                data[start : self.server.cut or None] if name.endswith("model.safetensors") else data[start:]
            )


def sibling(name, data):
    entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return entry


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.gated, server.cut, server.seen, server.content = False, 0, [], {}
    server.siblings = [sibling(name, data) for name, data in FILES.items()]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        download.main([ID, *argv] if not argv or argv[0].startswith("-") else list(argv))
    text = str(caught.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def held(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_parts_that_a_trainer_reads(server, tmp_path, capsys):
    download.main([ID, "--list"])
    out = capsys.readouterr().out
    assert all(name in out for name in WANTED) and "README" not in out and "fp16" not in out and COMMIT in out
    assert not list(tmp_path.iterdir())
    download.main([ID, "--revision", "main"])
    assert held(tmp_path / "Tiny-Diffusers") == {name: FILES[name] for name in WANTED}
    assert [p.name for p in tmp_path.iterdir()] == ["Tiny-Diffusers"]
    (tmp_path / "Tiny-Diffusers" / "transformer" / "config.json").unlink()
    server.seen.clear()
    download.main([ID, "--to", "Tiny-Diffusers"])
    assert held(tmp_path / "Tiny-Diffusers") == {name: FILES[name] for name in WANTED}
    assert {path for command, path, _ in server.seen if command == "GET" and "resolve" in path} == {
        f"/{ID}/resolve/{COMMIT}/transformer/config.json"
    }


def test_what_is_cut_off_is_no_model_and_goes_on(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept of a cut answer
    server.cut = 300_000
    assert "no connection" in fails(capsys, "--to", "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {".partial"}
    server.cut = 0
    server.seen.clear()
    download.main([ID, "--to", "x"])
    assert held(tmp_path / "x") == {name: FILES[name] for name in WANTED}
    assert [r for _, path, r in server.seen if r and path.endswith("diffusion_pytorch_model.safetensors")]


def test_other_bytes_are_found(server, tmp_path, capsys):
    server.content = {"transformer/config.json": b'{"a": 2}'}
    assert "transformer/config.json came with other bytes" in fails(capsys)
    server.content = {"text_encoder/model.safetensors": WEIGHTS[1:5001]}
    assert "text_encoder/model.safetensors came with other bytes" in fails(capsys, "--to", "x")
    shutil.rmtree("x")
    server.content = {}
    download.main([ID])
    (tmp_path / "Tiny-Diffusers" / "tokenizer" / "spiece.model").write_bytes(b"\0\2")
    assert "is not the file of owner/Tiny-Diffusers at main: move it away" in fails(capsys)
    shutil.rmtree(tmp_path / "Tiny-Diffusers")
    server.siblings = [sibling("model_index.json", b"{}"), sibling("transformer/../../x.json", b"{}")]
    assert "lists a file 'transformer/../../x.json'" in fails(capsys)
    server.siblings = [sibling("transformer/config.json", b"{}")]
    assert "has no model_index.json" in fails(capsys) and not list(tmp_path.iterdir())


def test_one_line_says_why_not(server, tmp_path, capsys, monkeypatch):
    assert "has no revision v9" in fails(capsys, "--revision", "v9")
    assert "there is no owner/Absent at" in fails(capsys, "owner/Absent")
    assert "no id of a model" in fails(capsys, "just-a-name") and "no id" in fails(capsys, "../x/y")
    server.gated = True
    assert "is gated: accept its terms at http" in fails(capsys) and "HF_TOKEN is not set" in fails(capsys)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "is gated" in fails(capsys) and "HF_TOKEN is set, and is not enough" in fails(capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setenv("HF_TOKEN", "right")
    assert "bytes are to be fetched, and 1 are free" in fails(capsys, "--to", "y")
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in fails(capsys, "--to", "file")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "vae").symlink_to(tmp_path)
    (tmp_path / "y" / "transformer").symlink_to(tmp_path)
    assert "leads out of y" in fails(capsys, "--to", "y")
    server.shutdown()
    server.server_close()
    assert "no connection (" in fails(capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(capsys)


def test_the_command(server, tmp_path):
    """In a process of its own, which takes endpoint and token from the environment alone and does not load torch."""
    server.gated = True
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "right",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
    }
    program = (
        "import sys; from titan_video import download; download.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    p = subprocess.run(
        [sys.executable, "-c", program, ID, "--to", "x"], env=env, capture_output=True, text=True, timeout=60
    )
    assert p.returncode == 0 and "all verified" in p.stdout, p.stdout + p.stderr
    assert held(tmp_path / "x") == {name: FILES[name] for name in WANTED} and not (tmp_path / "home").exists()
