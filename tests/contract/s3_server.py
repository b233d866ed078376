"""A real S3 server for tests: OpenStack Swift with its S3 API, all four services in one process.

Owns a throw-away server on loopback, without replication. Run as a process of its own, because Swift patches the
standard library: `python tests/contract/s3_server.py DIR`. Prints how to reach it, as one line of JSON, once it
listens. DIR must stand on a file system with extended attributes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import eventlet

eventlet.monkey_patch()

import eventlet.wsgi  # noqa: E402 - after the patch
from swift.common import utils  # noqa: E402

ACCESS_KEY = "test:tester"
SECRET_KEY = "kiln-bucket-secret-5f1c"

_SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
[storage-policy:0]
name = default
default = yes
"""

_PROXY_CONF = """
[DEFAULT]
swift_dir = {folder}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats s3api tempauth copy slo dlo versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = 60
conn_timeout = 10
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""


def serve(folder: Path) -> None:
    """Serve below `folder` until the process ends."""
    (folder / "swift.conf").write_text(_SWIFT_CONF)
    utils.set_swift_dir(str(folder))
    utils.validate_configuration()
    # Only now: these read swift.conf when they are imported.
    from swift.account.server import app_factory as make_account
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import loadapp
    from swift.container.server import app_factory as make_container
    from swift.obj.server import app_factory as make_object

    (folder / "devices" / "disk").mkdir(parents=True)
    conf = {
        "swift_dir": str(folder),
        "devices": str(folder / "devices"),
        "mount_check": "false",
        "log_level": "ERROR",
        "fallocate_reserve": "0",
    }
    for name, make in (("account", make_account), ("container", make_container), ("object", make_object)):
        socket = eventlet.listen(("127.0.0.1", 0))
        ring = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
        address = {"ip": "127.0.0.1", "port": socket.getsockname()[1]}
        replication = {f"replication_{key}": value for key, value in address.items()}
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "disk", **address, **replication})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
        eventlet.spawn(_run, socket, make(conf))
    (folder / "proxy.conf").write_text(_PROXY_CONF.format(folder=folder, secret=SECRET_KEY))
    socket = eventlet.listen(("127.0.0.1", 0))
    proxy = loadapp(str(folder / "proxy.conf"))
    address = {
        "endpoint_url": f"http://127.0.0.1:{socket.getsockname()[1]}",
        "region": "us-east-1",
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET_KEY,
    }
    print(json.dumps(address), flush=True)
    _run(socket, proxy)


def _run(socket: Any, app: Any) -> None:
    eventlet.wsgi.server(socket, app, log_output=False, max_size=64, keepalive=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).absolute())
