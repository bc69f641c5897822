"""`BACKEND=process`: one worker process a device. The door is `router.backends.process.fleet.ProcessFleet`.

fleet       all workers together: who gets a call, and what a death means
worker      one worker's life: forked, watched, forked anew
link        the parent's end of a worker's socket
outbox      which requests to a worker are sent, wait, or are forgotten
child       the worker's end, and its `main`
charges     which models were running when workers died
"""
