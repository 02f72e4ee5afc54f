"""For all tests: signals as a program that is started from a terminal finds them."""

import signal

# A background job of a shell ignores SIGINT, one under nohup SIGHUP, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
