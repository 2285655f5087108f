"""Does what a newcomer does: every ``sh`` block of the README and the pages, in order, from nothing.

    python tools/newcomer.py [--out TABLE.md] [--only TEXT ...] [--long] [--folder FOLDER]

All lies in one new folder: a fresh clone, an empty virtual environment, an empty HOME. For each block it
prints the time it took, and by how many megabytes the folder grew; the exit status is 1 if one failed.
Commands of an earlier block are not run again. What a block needs that many machines lack says a comment
before it:

    <!-- newcomer: needs a GPU -->
    <!-- newcomer: takes long: ten minutes -->

Such blocks are listed as skipped, with the reason; ``--long`` runs those that only take long. What
configures pip and ccache is passed on.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"^(?:<!-- newcomer: (?P<needs>.*?) -->\n)?```sh\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
PASSED_ON = ("PIP_", "CCACHE_", "CMAKE_CXX_COMPILER_LAUNCHER", "SSL_", "LANG")
HEAD = (
    f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
    f"{time.strftime('%Y-%m-%d')}:\n\n| page | block | s | MB | |\n|---|---|---|---|---|"
)


class Block(NamedTuple):
    """A block of a page that a reader types."""

    page: str
    text: str
    needs: str  # why it is skipped, or nothing

    def commands(self) -> str:
        """The block without comments: the same commands are not typed twice."""
        return "\n".join(re.sub(r"\s+#.*", "", line).strip() for line in self.text.splitlines())


def pages(root: Path) -> list[str]:
    """The README, and the pages in the order of the site."""
    index = (root / "docs" / "index.md").read_text()
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE)
    names = [line for tree in trees for line in tree.split("\n\n", 1)[1].split()]
    return ["README.md", *(f"docs/{name}.md" for name in names)]


def blocks(root: Path) -> Iterator[Block]:
    """Every ``sh`` block, in the order of the pages."""
    for page in pages(root):
        for match in FENCE.finditer((root / page).read_text()):
            yield Block(page, match["text"], match["needs"] or "")


def megabytes(folder: Path) -> int:
    """What a folder takes on the disk."""
    done = subprocess.run(["du", "-sm", folder], capture_output=True, text=True)  # files may vanish meanwhile
    return int(done.stdout.split()[0])


def environment(folder: Path) -> dict[str, str]:
    """That of somebody who has just activated an empty virtual environment."""
    for name in ("home", "tmp", "logs"):
        (folder / name).mkdir()
    subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder / "venv"], check=True
    )
    passed_on = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    return passed_on | {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "VIRTUAL_ENV": str(folder / "venv"),
        "PATH": f"{folder / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }


def main() -> None:
    """Runs the blocks and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="blocks that contain one of these"
    )
    parser.add_argument("--long", action="store_true", help="run the blocks that only take long, too")
    parser.add_argument("--folder", type=Path, help="where all lies, new; kept (default: a temporary one)")
    parser.add_argument("--limit", type=float, default=3600, metavar="S", help="for each block, in seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "newcomer"
        folder.mkdir(parents=True)
        folder = folder.resolve()
        variables, clone, failed, typed = environment(folder), folder / "schedulefree_cpp", False, set[str]()
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        rows = [HEAD]
        print(HEAD, flush=True)
        for number, block in enumerate(blocks(clone)):
            took, grew = "", ""
            if block.needs and not (options.long and block.needs.startswith("takes long")):
                result = f"skipped: {block.needs}"
            elif block.commands() in typed:
                result = "as above"
            elif not any(text in block.text for text in options.only):
                result = "not asked for"
            else:
                typed.add(block.commands())
                before, begin = megabytes(folder), time.monotonic()
                log = folder / "logs" / f"{number}.txt"
                with log.open("w") as output:
                    command = [
                        "timeout",
                        str(options.limit),
                        "bash",
                        "-e",
                        "-o",
                        "pipefail",
                        "-c",
                        block.text,
                    ]
                    status = subprocess.run(
                        command,
                        cwd=clone,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    ).returncode
                took, grew = f"{time.monotonic() - begin:.0f}", f"{megabytes(folder) - before:+d}"
                result = f"FAILED ({status})" if status else "passed"
                failed |= status != 0
                if status:
                    print("".join(log.read_text().splitlines(keepends=True)[-40:]), file=sys.stderr)
            shown = "<br>".join(f"`{line}`" for line in block.commands().splitlines())
            rows.append(f"| {block.page} | {shown} | {took} | {grew} | {result} |")
            print(rows[-1], flush=True)
            if options.out:
                options.out.write_text("\n".join(rows) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
