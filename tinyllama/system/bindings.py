"""tinygrad's bindings of libraries: when they are read, and from which file."""

import importlib
import importlib.util
import sys

_AUTOGEN = "tinygrad.runtime.autogen"


def bind_nvrtc() -> None:
    """Read the binding of NVRTC, which takes the library that NVRTC_PATH names."""
    importlib.import_module(f"{_AUTOGEN}.nvrtc")


def defer_llvm() -> None:
    """Let the binding of LLVM be read when it is first used; no effect where it has been read.

    tinygrad's devices read it when they are imported, whichever compiler is used: 50 MB of libLLVM.
    No second thread may use it before it is read: on Python 3.11 it would find half of it. None
    does, since tinygrad's LLVM compilers use it as soon as they are made, when a device is opened.
    """
    name = f"{_AUTOGEN}.llvm"
    if name in sys.modules:  # a look at any attribute of it reads it
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    vars(sys.modules[_AUTOGEN])["llvm"] = module
