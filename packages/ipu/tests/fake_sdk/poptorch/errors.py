"""PopTorch's exceptions."""


class Error(Exception):
    """What PopTorch raises on purpose."""

    def __init__(self, message, kind="poptorch_py_error"):
        super().__init__(f"'{kind}': {message}")
        self.type, self.message, self.location = kind, message, ""


class RecoverableError(Error):
    """The hardware wants a reset."""

    def __init__(self, message, recovery_action="IPU_RESET"):
        super().__init__(message, "poptorch_cpp_error")
        self.recovery_action = recovery_action


class UnrecoverableError(Error):
    """The hardware wants an operator."""
