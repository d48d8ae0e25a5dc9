"""Whether this process was asked to stop, for those that wait for what may never come."""

import threading

ASKED = threading.Event()  # set from a signal to the end of `commands.StopRequest`
