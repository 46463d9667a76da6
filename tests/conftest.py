"""What tests start hears SIGHUP and SIGINT, even where pytest runs in the background or under nohup."""

import signal

for name in ("SIGHUP", "SIGINT"):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
