"A process that a script starts in the background ignores Ctrl-C, and so would all that it starts: the tests of interruption need the usual handler."
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
