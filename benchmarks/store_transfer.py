"""Publishing and downloading one large object against boto3's own transfer, as ratios of throughput in one run.

    python benchmarks/store_transfer.py
    python benchmarks/store_transfer.py --mib 512 --rounds 9 --s3-url http://KEY:SECRET@HOST:PORT/BUCKET

Both use the same server, file and number of connections, in turns, one round after the other, so that whatever else
the machine does hits both. `bare` is `upload_file` and `download_file` of boto3 with parts of the same size. EdgeKiln
does what it always does: going up, the digest of the whole and a SHA-256 of each part for the server to check; coming
down, the digest of what arrived. A ratio is EdgeKiln's throughput over boto3's in the same round; above 1 EdgeKiln is
faster. Given are the medians, and the quartiles of the rounds' ratios as a measure of the noise.

Without `--s3-url` it starts OpenStack Swift with its S3 API on this machine: one process, which is what limits both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.storage import S3Options, blob_key, digest_file, open_store
from tests.services import make_bucket, make_s3_client, parse_s3_url, s3_server

_PREFIX = "store-transfer"


@contextmanager
def reach_server(url: str | None, folder: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Yield the address of a server, and a bucket there."""
    if url:
        yield parse_s3_url(url)
        return
    with s3_server(folder) as address:
        make_bucket(address, "artifacts")
        yield address, "artifacts"


def time_call(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    started = time.monotonic()
    call()
    return time.monotonic() - started


def compare(address: dict[str, str], bucket: str, folder: Path, size_mib: int, rounds: int) -> dict[str, Any]:
    """Measure all rounds; return throughputs and ratios, up and down."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as stream:
        for _ in range(size_mib):
            stream.write(os.urandom(1 << 20))
    sha256, _size_bytes = digest_file(source)
    options = S3Options(**address, addressing="path")
    store = open_store(f"s3://{bucket}/{_PREFIX}", options)
    client = make_s3_client(address)
    config = TransferConfig(
        multipart_chunksize=options.part_size_bytes,
        multipart_threshold=options.part_size_bytes,
        max_concurrency=options.parallel,
    )
    key, bare_key = blob_key(sha256), f"{_PREFIX}/bare"
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "publish": (
            lambda: store.put_file(key, source, sha256, is_final=True, anew=True),
            lambda: client.upload_file(str(source), bucket, bare_key, Config=config),
        ),
        "download": (
            lambda: store.get_file(key, target, sha256),
            lambda: client.download_file(bucket, bare_key, str(target), Config=config),
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    # One more round, whose times do not count.
    for number in range(rounds + 1):
        for name, pair in calls.items():
            # Whoever comes second finds the machine warmer: they take turns.
            order = (0, 1) if number % 2 else (1, 0)
            measured = {which: time_call(pair[which]) for which in order}
            if number:
                times[name].append((measured[0], measured[1]))
            print(f"round {number}: {name} {measured[0]:.2f} s, bare {measured[1]:.2f} s", file=sys.stderr)
    store.delete(key)
    client.delete_object(Bucket=bucket, Key=bare_key)
    return {name: summarize(pairs, size_mib) for name, pairs in times.items()}


def summarize(pairs: list[tuple[float, float]], size_mib: int) -> dict[str, Any]:
    """Return medians of throughput, and the ratios' median and quartiles."""
    ratios = [bare_s / own_s for own_s, bare_s in pairs]
    low, _middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return {
        "mib_per_s": round(size_mib / statistics.median(own_s for own_s, _ in pairs), 1),
        "bare_mib_per_s": round(size_mib / statistics.median(bare_s for _, bare_s in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_quartiles": [round(low, 2), round(high, 2)],
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--s3-url", help="another server: http://KEY:SECRET@HOST:PORT/BUCKET")
    parser.add_argument("--work-dir", type=Path, help="where the files go; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        folder = Path(name)
        with reach_server(arguments.s3_url, folder / "server") as (address, bucket):
            figures = compare(address, bucket, folder, arguments.mib, arguments.rounds)
    print(json.dumps({"mib": arguments.mib, "rounds": arguments.rounds, **figures}, indent=2))


if __name__ == "__main__":
    main()
