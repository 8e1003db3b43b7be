"""A local stand-in for the Hugging Face Hub, with which the stock client works: its HTTP API, in memory.

With the fixture `hub`, the client of this process talks to a `LocalHub` and to nobody else. Each file has the upload
mode "regular", so that neither LFS nor Xet is met. The Hub itself keeps weights in these, and tells their sha256.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from socketserver import ThreadingTCPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http, httpx
from huggingface_hub.utils.tqdm import progress_bar_states


TOKEN, USER = "hf_local", "tester"
TRIES = 6  # How often the client sends a commit that is answered with 500, before it gives up.
REPO, REVISION = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
# Method and path, the method of `LocalHub` that answers, and whether it needs the token.
ROUTES = (
    (r"GET /api/whoami-v2", "_whoami", True),
    (r"POST /api/repos/create", "_create", True),
    (r"POST /api/validate-yaml", "_validate", False),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", "_preupload", True),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", "_commit", True),
    (rf"GET /api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "_tree", False),
    (rf"GET /api/models/{REPO}(?:/revision/{REVISION})?", "_info", False),
    (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", "_resolve", False),
)


@dataclass(frozen=True)
class Commit:
    """The whole tree after the commit, and the paths that it added, replaced or removed."""

    oid: str
    message: str
    files: dict[str, bytes]
    changed: tuple[str, ...]


class Refusal(Exception):
    """An answer that is an error. By `code`, the client tells a missing file from a missing repository."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **rest):
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit}
        super().__init__(status, {name: value for name, value in headers.items() if value}, {"error": message, **rest})


def blob_oid(data: bytes) -> str:
    """What git, and the Hub for a regular file, call this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LocalHub(ThreadingTCPServer):
    """The stand-in: `with LocalHub() as hub` listens at `hub.endpoint`, an address of this machine.

    Writing needs the token `TOKEN`. Reading needs none, but a wrong one is refused. A new repository has one commit, of
    `.gitattributes`, as on the Hub. `requests` holds method and path of each request, in order of arrival; `gaps`, what
    the stand-in failed to answer.
    """

    request_queue_size = 64  # The threads of `snapshot_download` connect at once.

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[str] = []
        self.gaps: list[str] = []
        self._commits: dict[str, list[Commit]] = {}
        self._failures: list[int] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def commits(self, repo: str) -> list[Commit]:
        """Return the commits to a repository, the first one first."""
        return list(self._commits[repo])

    def fail_next(self, count: int, status: int = 500) -> None:
        """Let the next `count` commit requests fail. One that fails with 500 is sent `TRIES` times in all."""
        self._failures = [status] * count

    def edit(self, repo: str, path: str, data: bytes | None) -> Commit:
        """Make a commit that replaces a file, or removes it, as anybody who may write can at any time."""
        with self.lock:
            return self._add(repo, f"Update {path}", {path: data})

    def environment(self, home: str | Path) -> dict[str, str]:
        """Return the variables with which a process that starts talks to this hub, and caches in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home, "hub")),
            "HF_TOKEN_PATH": str(Path(home, "token")),
            "HF_HUB_OFFLINE": "0",
            **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
            # Where a repository has no safetensors, transformers would send the token to a converter elsewhere.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
        }

    def answer(self, method: str, target: str, token: str | None, body: bytes) -> tuple[dict, object]:
        """Return headers and content, which is JSON if it is not bytes."""
        url = urlsplit(target)
        routes = ((re.fullmatch(pattern, f"{method} {url.path}"), *rest) for pattern, *rest in ROUTES)
        found, name, needs_token = next(route for route in routes if route[0])
        if token != f"Bearer {TOKEN}" and (needs_token or token is not None):
            raise Refusal(401, "Invalid credentials in Authorization header")
        given = {key: unquote(value or "") for key, value in found.groupdict().items()}
        if "repo" in given:
            given["commit"] = self._at(given["repo"], given["revision"] or "main")
        return getattr(self, name)(SimpleNamespace(body=body, query=parse_qs(url.query), **given))

    def _at(self, repo: str, revision: str) -> Commit:
        if repo not in self._commits:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        for commit in reversed(self._commits[repo]):
            if revision in ("main", commit.oid):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _add(self, repo: str, message: str, changes: dict[str, bytes | None]) -> Commit:
        """Commit the new bytes at each path, or `None` where it is removed."""
        commits = self._commits.setdefault(repo, [])
        oid, before = (commits[-1].oid, commits[-1].files) if commits else (repo, {})
        files = {path: data for path, data in {**before, **changes}.items() if data is not None}
        changed = tuple(sorted(path for path in changes if before.get(path) != files.get(path)))
        oid = hashlib.sha1(repr((oid, message, sorted(changes.items()))).encode()).hexdigest()
        commits.append(Commit(oid, message, files, changed))
        return commits[-1]

    def _whoami(self, asked):
        return {}, {"type": "user", "name": USER, "orgs": []}

    def _create(self, asked):
        wanted = json.loads(asked.body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self._commits:
            raise Refusal(409, "You already created this model repo", url=url)
        self._add(name, "initial commit", {".gitattributes": b"*.bin filter=lfs\n"})
        return {}, {"url": url}

    def _validate(self, asked):
        """Refuse a card for what the Hub refuses one for: no YAML, and a base model that is a path or nothing."""
        block = re.match(r"\s*---\r?\n(.*?)\n---", json.loads(asked.body)["content"], re.DOTALL)
        try:
            card = (block and yaml.safe_load(block[1])) or {}
            base = card.get("base_model")
            if isinstance(base, str) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):
                raise ValueError(f'"base_model" with value "{base}" is not valid. Use a model id.')
        except (ValueError, yaml.YAMLError) as error:
            raise Refusal(400, str(error), errors=[{"message": str(error)}]) from error
        return {}, {"warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _preupload(self, asked):
        """Say of each file how to send it, whether `.gitignore` names it, and which content is there already."""
        wanted, files = json.loads(asked.body), asked.commit.files
        rules = wanted.get("gitIgnore", files.get(".gitignore", b"").decode()).split()
        answers = []
        for path in (one["path"] for one in wanted["files"]):
            ignored, oid = any(fnmatch(path, rule) for rule in rules), blob_oid(files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": "regular", "shouldIgnore": ignored, "oid": oid})
        return {}, {"files": answers}

    def _commit(self, asked):
        if self._failures:
            raise Refusal(self._failures.pop(), "This commit fails, as the test wants it")
        (_, header), *lines = (json.loads(line).values() for line in asked.body.splitlines())
        if header.get("parentCommit", asked.commit.oid) != self._commits[asked.repo][-1].oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = {}
        for key, value in lines:
            if {"file": False, "deletedFile": True}[key] and value["path"] not in asked.commit.files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            changes[value["path"]] = base64.b64decode(value["content"]) if key == "file" else None
        oid = self._add(asked.repo, header["summary"], changes).oid
        return {}, {"commitOid": oid, "commitUrl": f"{self.endpoint}/{asked.repo}/commit/{oid}"}

    def _tree(self, asked):
        folder = f"{asked.path}/" if asked.path else ""
        files = {path[len(folder) :]: data for path, data in asked.commit.files.items() if path.startswith(folder)}
        if not files:
            raise Refusal(404, f"{asked.path} does not exist on {asked.revision}", "EntryNotFound")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        entries = [("file", *one) for one in files.items()] + [("directory", one, b"") for one in folders]
        return {}, [
            {"type": kind, "path": folder + path, "size": len(data), "oid": blob_oid(data)}
            for kind, path, data in sorted(entries)
            if asked.query.get("recursive") == ["true"] or "/" not in path
        ]

    def _info(self, asked):
        siblings = [{"rfilename": path} for path in sorted(asked.commit.files)]
        for one in siblings if asked.query.get("blobs") == ["true"] else []:
            data = asked.commit.files[one["rfilename"]]
            one.update(size=len(data), blobId=blob_oid(data))
        return {}, {"id": asked.repo, "sha": asked.commit.oid, "siblings": siblings, "tags": []}

    def _resolve(self, asked):
        if asked.path not in asked.commit.files:
            # With the commit, so that the client remembers that the file is missing there.
            raise Refusal(404, "Entry not found", "EntryNotFound", asked.commit.oid)
        data = asked.commit.files[asked.path]
        return {"X-Repo-Commit": asked.commit.oid, "ETag": f'"{blob_oid(data)}"'}, data


class _Handler(BaseHTTPRequestHandler):
    # In HTTP/1.0, a connection ends with its answer, so that closing the server waits for answers alone.
    def _answer(self) -> None:
        hub, status, asked = self.server, 200, f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with hub.lock:
            hub.requests.append(asked)
            try:
                headers, content = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
            except Refusal as refusal:
                status, headers, content = refusal.args
            except Exception as error:
                hub.gaps.append(f"{asked}: {error!r}")
                status, headers, content = 501, {}, {"error": "The stand-in has no answer"}
        data = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A hub that the client of this process talks to, with the token `TOKEN` and an empty cache, and nobody else."""
    with LocalHub() as hub:
        point_at(hub, tmp_path_factory.mktemp("hub"), monkeypatch)
        yield hub
        # Pushes in the background end here, before the client talks to the Hub again.
        for client in (hf_api.api, transformers.utils.hub.hf_api()):
            if client._thread_pool is not None:
                client._thread_pool.shutdown()
        _http.close_session()
    # The client passes over some failures. A test must not.
    assert not hub.gaps, "\n".join(hub.gaps)


def point_at(hub: LocalHub, home: Path, monkeypatch) -> None:
    """Let the client talk to `hub` that is imported already, and has read its environment."""
    for name, value in (variables := hub.environment(home)).items():
        monkeypatch.setenv(name, value)

    def only_the_hub(request) -> None:
        if not str(request.url).startswith(f"{hub.endpoint}/"):
            hub.gaps.append(f"{request.method} {request.url}: not the hub")
            raise httpx.UnsupportedProtocol(hub.gaps[-1])

    hooks = {"request": [_http.hf_request_event_hook, only_the_hub]}
    monkeypatch.setitem(progress_bar_states, "_global", False)
    for where, name, value in (
        (constants, "ENDPOINT", hub.endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        *((constants, name, variables[name]) for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH")),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_DISABLE_TELEMETRY", True),
        # `huggingface_hub.file_exists` and the like are methods of this one. Transformers makes its own on first use.
        (hf_api.api, "endpoint", hub.endpoint),
        (hf_api.api, "_thread_pool", None),
        (hf_api.api, "_whoami_cache", {}),
        (transformers.utils.hub, "_hf_api", None),
        (transformers.utils.logging, "_tqdm_active", False),
        (_http, "_GLOBAL_CLIENT", None),
        (_http, "_GLOBAL_CLIENT_FACTORY", lambda: httpx.Client(event_hooks=hooks, timeout=30, trust_env=False)),
        # No waiting between retries.
        (_http, "time", SimpleNamespace(sleep=lambda _: None)),
    ):
        monkeypatch.setattr(where, name, value)
