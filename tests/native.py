"""Where the tests keep the compiled step, so that it is built once."""

from tests.checkout import ROOT

NATIVE = ROOT / "build" / "native"
