"""`edgekiln devices`, `tools` and `device-worker`: phones, what measures on them, and who follows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, print_table, say
from service.errors import InvalidRequest

WORKER_EPILOG = """Examples:

\b
  edgekiln device-worker
  edgekiln device-worker --data-dir /srv/edgekiln --adb-host bench-7 --adb-port 5037
"""
DEVICES_EPILOG = """Examples:

\b
  edgekiln devices
  edgekiln devices --json | jq -r '.[] | select(.state == "quarantined") | .reason'
  edgekiln devices tag R5CT1234567 lab slow
  edgekiln devices release R5CT1234567
"""
TOOLS_EPILOG = """Examples:

\b
  edgekiln tools
  edgekiln tools add benchmark_model --version 2.2.0 --abi arm64-v8a ./benchmark_model
  edgekiln tools add litert_lm_advanced_main --version 0.17.0 --abi arm64-v8a ./litert_lm_advanced_main \\
      --library libLiteRtOpenClAccelerator.so
  edgekiln tools add benchmark_model --version 2.3.0 --abi arm64-v8a ./benchmark_model --rebenchmark
"""

DeviceId = Annotated[str, typer.Argument(metavar="ID", help="A phone's serial number, as `edgekiln devices` lists it.")]

devices = typer.Typer(help="Show devices, name them, take them out of quarantine.", epilog=DEVICES_EPILOG)
tools = typer.Typer(help="Show and register what measures on phones.", epilog=TOOLS_EPILOG)


def device_worker(
    data_dir: options.DataDir = None,
    adb_host: Annotated[
        str | None, typer.Option("--adb-host", metavar="H", help="Where the adb server is. [env: EDGEKILN_ADB_HOST]")
    ] = None,
    adb_port: Annotated[
        int | None, typer.Option("--adb-port", metavar="P", help="Its port. [env: EDGEKILN_ADB_PORT; default: 5037]")
    ] = None,
) -> None:
    """Follow an adb server and measure on its phones, until Ctrl-C."""
    settings = options.read_settings(data_dir=data_dir, adb_host=adb_host, adb_port=adb_port)
    packages = str(Path(__file__).resolve().parents[2])
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        **settings.to_environment(),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([packages, *inherited])),
    }
    sys.stdout.flush()
    # The worker's packages are not the command's to import: it becomes the worker.
    os.execve(sys.executable, [sys.executable, "-m", "workers.device_worker"], environment)


@devices.callback(invoke_without_command=True)
def list_devices(
    context: typer.Context,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show every phone that was ever attached, and the hosts that measure: what each is, and how it is."""
    if context.invoked_subcommand is not None:
        return
    with options.connect(url, api_key) as client:
        found = client.devices()
    if as_json:
        print_json(found)
        return
    columns = ("serial", "state", "kind", "model", "SoC", "system", "RAM", "ABI", "tags")
    print_table(columns, [_device_row(device) for device in found])
    for device in found:
        if device["reason"]:
            say(f"{device['id']}: {device['reason']}")


def _device_row(device: Mapping[str, Any]) -> list[str]:
    ram = f"{device['ram_gib']:g} GiB" if device["ram_gib"] else "-"
    return [
        device["id"],
        device["state"],
        device["kind"],
        f"{device['manufacturer'] or ''} {device['model'] or ''}".strip() or "-",
        device["soc"] or "-",
        device.get("os") or "-",
        ram,
        device["abi"] or "-",
        ", ".join(device["tags"]) or "-",
    ]


@devices.command("tag")
def tag_device(
    device_id: DeviceId,
    tag: Annotated[list[str] | None, typer.Argument(metavar="TAG...", help="None takes all away.")] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Give a phone tags in place of those it had; jobs select by them (`--device tag=lab`)."""
    with options.connect(url, api_key) as client:
        client.tag_device(device_id, tag or [])
    say(f"{device_id} is tagged {', '.join(tag or []) or 'nothing'}.")


@devices.command("release")
def release_device(device_id: DeviceId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Take a phone out of quarantine: its device worker looks at it anew."""
    with options.connect(url, api_key) as client:
        client.release_device(device_id)
    say(f"{device_id} is looked at anew.")


@tools.callback(invoke_without_command=True)
def list_tools(
    context: typer.Context,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show the tools that measure on phones; a phone gets the newest one for its ABI."""
    if context.invoked_subcommand is not None:
        return
    with options.connect(url, api_key) as client:
        found = client.tools()
    if as_json:
        print_json(found)
        return
    rows = [
        [tool["name"], tool["version"], tool["abi"], "\n".join(tool["files"]), "\n".join(_short(tool["files"]))]
        for tool in found
    ]
    print_table(("tool", "version", "ABI", "files", "SHA-256"), rows)


def _short(files: Mapping[str, str]) -> list[str]:
    return [digest[:16] for digest in files.values()]


@tools.command("add")
def add_tool(
    name: Annotated[str, typer.Argument(metavar="NAME", help="benchmark_model or litert_lm_advanced_main.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The program, built for the ABI.")],
    version: Annotated[str, typer.Option("--version", metavar="V", help="What measurements name it by.")],
    abi: Annotated[
        str, typer.Option("--abi", metavar="ABI", help="E.g. arm64-v8a: `adb shell getprop ro.product.cpu.abi`.")
    ],
    library: Annotated[
        list[Path] | None,
        typer.Option("--library", metavar="FILE", help="A shared library that lies beside it; may be repeated."),
    ] = None,
    rebenchmark: Annotated[
        bool,
        typer.Option("--rebenchmark", help="Measure with it what older versions have measured, on the same phones."),
    ] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Register a tool for an ABI; a version names bytes, once and for all."""
    files = {name: file, **{path.name: path for path in library or ()}}
    for path in files.values():
        if not path.is_file():
            raise InvalidRequest(f"{path} is no file.")
    begun = None
    with options.connect(url, api_key) as client:
        if rebenchmark:
            begun = client.rebenchmark(name, version, abi, files)
        else:
            client.add_tool(name, version, abi, files)
    say(f"{name} {version} for {abi} is registered.")
    if begun is not None:
        say(
            f"Benchmarks started with it: {begun['started']}. Known already: {begun['known']}. Left out: "
            f"{begun['away']} whose phones are not ready, {begun['refused']} for their tenants' quotas; the same "
            "command starts those later."
        )
