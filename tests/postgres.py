"""A PostgreSQL server of the tests' own: Debian's package, in a folder that is thrown away, on a socket of that folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def find_postgres() -> Path | None:
    """The folder of the server's programs; Debian keeps them off the path."""
    found = shutil.which("postgres")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return Path(found).parent if found else places[-1].parent if places else None


class Server:
    """Started on entering; `stop` and `start` in between are what a database that goes away and comes back does."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self.url = f"postgresql://postgres@/postgres?host={folder}"

    def __enter__(self) -> Server:
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
            self.folder.chmod(0o755)
            for parent in self.folder.parents:
                if parent.stat().st_uid == os.geteuid() and parent != parent.parent:
                    parent.chmod(parent.stat().st_mode | 0o011)
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "-D", self.folder / "data")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "-w", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-D", self.folder / "data", "-m", "immediate", "stop")

    def empty(self) -> None:
        """Leave no ledger in it."""
        import psycopg

        with psycopg.connect(f"host={self.folder} user=postgres dbname=postgres") as connection:
            connection.execute("DROP SCHEMA IF EXISTS m2helpers CASCADE")

    def _run(self, program: str, *words: str | Path) -> None:
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, self.programs / program, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
