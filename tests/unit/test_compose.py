"""docker-compose.yml and the Dockerfile: valid, complete, without default passwords, and in step with the code."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.ledger.plan import RESOURCE_CLASSES
from service.settings import Settings, load_settings
from service.supervisor import default_commands
from tests import compose
from tests.kiln import ROOT
from tests.services import give_up

FILE = compose.read_file()
SERVICES: dict[str, Any] = FILE["services"]
OWN = compose.own_services(FILE)
WORKERS = {name: service for name, service in OWN.items() if name.startswith("worker-")}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
#: What an operator must set; whatever else there is has a default.
SECRETS = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "GARAGE_RPC_SECRET"}
REQUIRED = {*SECRETS, "HOST_NAME"}
VALUES = {name: f"a-{name.lower()}" for name in REQUIRED}
#: Options whose values differ from one worker to another.
_OF_ONE_WORKER = ("-Q", "-n", "-s")


def read_schema() -> dict[str, Any]:
    """The Compose specification's own schema, as the package `check-jsonschema` ships it."""
    package = importlib.util.find_spec("check_jsonschema")
    if package is None or package.origin is None:
        give_up("no schema: the test requirement `check-jsonschema` is not installed")
    path = Path(package.origin).with_name("builtin_schemas") / "vendor" / "compose-spec.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def find_faults(document: dict[str, Any]) -> list[str]:
    schema = read_schema()
    from jsonschema.validators import validator_for

    return [f"{error.json_path}: {error.message}" for error in validator_for(schema)(schema).iter_errors(document)]


def test_the_file_follows_the_compose_specification() -> None:
    assert find_faults(FILE) == []
    assert find_faults(compose.read_compose(VALUES)) == []


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [("api", "comand", []), ("beat", "restart", ["always"]), ("redis", "healthcheck", {"test": 1})],
)
def test_a_mistake_in_the_file_would_be_seen(service: str, key: str, value: Any) -> None:
    """Control."""
    assert find_faults({**FILE, "services": {**SERVICES, service: {**SERVICES[service], key: value}}}) != []


def test_every_setting_exists_and_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"EDGEKILN_{name.upper()}" for name in Settings.model_fields}
    for name, service in compose.own_services(compose.read_compose(VALUES)).items():
        named = {variable for variable in service["environment"] if variable.startswith("EDGEKILN_")}
        assert named <= known, name
        with monkeypatch.context() as patch:
            for variable, value in service["environment"].items():
                patch.setenv(variable, str(value))
            settings = load_settings()
        assert settings.database_url.startswith("postgresql+psycopg://"), name
        assert settings.broker_url.startswith("redis://"), name
        assert settings.store_url.startswith("s3://"), name


def test_secrets_come_from_the_environment_and_have_no_defaults() -> None:
    forms = compose.find_variables(FILE)
    assert {name for name, how in forms.items() if how == {":?"}} == REQUIRED
    assert all(how.startswith((":-", ":?")) and len(forms[name]) == 1 for name in forms for how in forms[name])
    suspects = [name for name in forms if re.search("PASSWORD|SECRET|KEY|TOKEN", name)]
    optional = {"HUB_TOKEN", "SOURCE_S3_ACCESS_KEY_ID", "SOURCE_S3_SECRET_ACCESS_KEY", "TOKEN_KEYS"}
    assert {name for name in suspects if forms[name] != {":?"}} == optional
    assert all(forms[name] == {":-"} for name in optional)
    for name in REQUIRED:
        with pytest.raises(compose.MissingVariable, match=name):
            compose.read_compose(VALUES | {name: ""})


def test_only_fetches_get_the_sources_credentials_and_the_way_out() -> None:
    for credential in ("EDGEKILN_HUB_TOKEN", "EDGEKILN_SOURCE_S3_SECRET_ACCESS_KEY"):
        assert [name for name, service in OWN.items() if credential in service["environment"]] == ["worker-fetch"]
    sealing = [name for name, service in OWN.items() if "EDGEKILN_TOKEN_KEYS" in service["environment"]]
    assert sealing == ["api", "worker-fetch"]
    assert [name for name, service in OWN.items() if "outer" in service["networks"]] == ["worker-fetch"]
    assert FILE["networks"]["inner"]["internal"] is True
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert compose.read_compose(VALUES)["services"]["proxy"]["ports"] == ["127.0.0.1:8711:8711"]


def read_proxy(variables: dict[str, str]) -> list[str]:
    """Return the lines of the proxy's configuration, without comments and indentation."""
    content = compose.read_compose(VALUES | variables)["configs"]["proxy"]["content"]
    return [line.strip() for line in content.splitlines() if not line.strip().startswith("#")]


@pytest.mark.parametrize(
    ("variables", "trusted", "site"),
    [
        ({}, "127.0.0.1/32", ":8711"),
        ({"OUTER_PROXIES": "10.0.0.5 10.1.0.0/16", "SITE": "kiln.example"}, "10.0.0.5 10.1.0.0/16", "kiln.example"),
    ],
    ids=["by default nobody", "whom the operator names"],
)
def test_the_proxy_believes_those_that_are_named_and_passes_one_address_on(
    variables: dict[str, str], trusted: str, site: str
) -> None:
    """Every hop that the API trusts may write the header: Caddy leaves nothing in it that a client wrote."""
    lines = read_proxy(variables)
    assert [line for line in lines if line.startswith("trusted_proxies")] == [
        f"trusted_proxies static {trusted}",
        "trusted_proxies_strict",
    ]
    assert all(ipaddress.ip_network(each) for each in trusted.split())
    assert f"{site} {{" in lines
    assert "header_up X-Forwarded-For {client_ip}" in lines
    assert sum(line.endswith("{") for line in lines) == lines.count("}")
    proxy = SERVICES["proxy"]
    assert proxy["configs"] == [{"source": "proxy", "target": proxy["command"][-1]}]


def test_each_class_has_a_worker_that_takes_nothing_else() -> None:
    classes = set()
    for name, service in WORKERS.items():
        command = service["command"]
        resource_class = command[command.index("-Q") + 1]
        slots = {key: service["environment"][f"EDGEKILN_{key.upper()}_SLOTS"] for key in Settings().slots()}
        assert {key for key, count in slots.items() if count} == {resource_class}, name
        assert f"--concurrency={slots[resource_class]}" in command, name
        classes.add(resource_class)
    assert classes == set(RESOURCE_CLASSES.values()) == set(Settings().slots())


def strip(argv: list[str]) -> list[str]:
    """Leave out what one process has of its own."""
    kept, words = [], iter(argv)
    for word in words:
        if word in (*_OF_ONE_WORKER, "--fd"):
            next(words)
        elif not word.startswith("--concurrency="):
            kept.append(word)
    return kept


def test_the_commands_are_those_of_the_embedded_profile(tmp_path: Path) -> None:
    supervised = {
        command.name: ["python", *strip(list(command.argv))[1:]]
        for command in default_commands(load_settings({"data_dir": tmp_path}), 3)
    }
    commands = {name: strip(service["command"]) for name, service in OWN.items() if name != "migrate"}
    assert commands.pop("api") == supervised["api"]
    assert commands.pop("beat") == supervised["beat"]
    assert all(command == supervised["worker"] for command in commands.values())
    assert commands.keys() == WORKERS.keys()


def test_every_service_is_watched_bounded_and_started_again() -> None:
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"], name
        # A benchmark measures the whole machine.
        assert "cpus" in limits or name == "worker-device", name
        if name != "migrate":
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"][0] == "CMD", name
    assert SERVICES["migrate"]["restart"] == "no"


def test_nobody_starts_before_what_it_needs() -> None:
    for name, service in OWN.items():
        if name == "migrate":
            assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
        else:
            conditions = {need: how["condition"] for need, how in service["depends_on"].items()}
            assert conditions.pop("migrate") == "service_completed_successfully", name
            assert conditions == {"redis": "service_healthy", "store": "service_healthy"}, name


def test_our_processes_have_no_privileges_and_share_one_image() -> None:
    assert len({service["image"] for service in OWN.values()}) == 1
    for name, service in OWN.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "user" not in service, f"{name}: the image names the user"
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]


def test_volumes_that_are_used_are_there() -> None:
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("$")
    }
    assert used == FILE["volumes"].keys()


def test_broker_and_store_keep_what_they_have_taken() -> None:
    redis = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in redis
    assert "--maxmemory-policy noeviction" in redis
    garage = FILE["configs"]["garage"]["content"]
    assert "data_fsync = true" in garage
    assert "metadata_fsync = true" in garage


def test_the_image_is_built_from_what_is_here() -> None:
    base = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    assert base == {"python:3.11-slim-bookworm"}
    sent = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert "--constraint requirements.lock" in DOCKERFILE
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert {service["image"] for service in OWN.values()} == {f"edgekiln:{version[1]}"}
