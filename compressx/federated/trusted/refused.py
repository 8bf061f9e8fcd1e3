"""The one error by which anything from outside is refused."""


class Refused(ValueError):
    """What came from outside is not accepted; nothing of it was used.

    Attributes:
      reason: one word for counting and tests: "size", "structure", "signature", "chain", "debug", "measurement",
        "binding", "tcb", "client", "session", "round", "sequence", "decryption", "message", "counted", "rollback",
        "sealed", "policy".
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason
