"""Prints a C++ header as Doxygen is to read it: SGD, AdamW and RAdam as the classes that programs see.

The header has one template, ``detail::OptimizerOf``, and names its instances.
"""

import re
import sys
from pathlib import Path


def main() -> None:
    """Replaces each ``using NAME = detail::OptimizerOf<OPTIONS>;`` by the template's body with its names."""
    text = Path(sys.argv[1]).read_text()
    template = re.search(
        r"^/// [^\n]*\ntemplate <class OwnOptions>\n(class OptimizerOf : .*?^};)$",
        text,
        re.DOTALL | re.MULTILINE,
    )
    if template:
        body = template[1]
        text = re.sub(
            r"^using (\w+) = detail::OptimizerOf<(\w+)>;$",
            lambda match: body.replace("OptimizerOf", match[1]).replace("OwnOptions", match[2]),
            text.replace(template[0], ""),
            flags=re.MULTILINE,
        )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
