# SPDX-License-Identifier: MPL-2.0
"""Resident memory of the server, idle and after each 500 of 3,000 deployments: archives, source file, and memory that is not locked."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from common import ROOT, Link, announce, make_host, service, signed_request


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def measure(name: str, *argv: str) -> None:
    """Print the memory of one server over its deployments."""
    host = make_host(service('["echo", "{{IMAGE}}"]')).start(argv=argv)
    try:
        time.sleep(3)
        found = [resident_mb(host.process.pid)]
        link = Link(host.port)
        for number in range(1, 3001):
            link.send(signed_request({"service": "web", "image": "app:1", "deploy_id": f"d{number}"}, query="?wait=30"))
            status, body = link.receive()
            assert status == 200, body
            if number % 500 == 0:
                found.append(resident_mb(host.process.pid))
    finally:
        host.close()
    print(f"  {name:14} " + "  ".join(f"{value:5.1f}" for value in found), flush=True)


def main() -> None:
    announce("Resident memory of the server in MB: idle, then after 500, 1000, ... 3000 deployments")
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("byte-code.pyz", ["--python", sys.executable]), ("source.pyz", [])):
            archive = str(pathlib.Path(folder, name))
            subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), "--output", archive, *flags], check=True, capture_output=True)
            measure(name, sys.executable, archive)
        # The interpreter keeps the syntax tree of the script that it runs: 14 MB that an archive does not cost.
        measure("hookshot.py", sys.executable, str(ROOT / "hookshot.py"))
        if os.geteuid() == 0 and shutil.which("setpriv"):
            # Root's server locks its memory; without the right to do so it does not.
            measure("not locked", "setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", sys.executable, str(ROOT / "hookshot.py"))


if __name__ == "__main__":
    sys.exit(main())
