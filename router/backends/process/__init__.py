"""`BACKEND=process`: one worker process per device. The entry point is `router.backends.process.fleet.ProcessFleet`.

fleet       all workers: routes calls, and handles crashes
worker      supervises one process: forks, watches and restarts it
link        the parent's end of a worker's socket
outbox      the queue of requests to one worker
child       the worker's end of the socket, and its `main`
crashes     counts crashes by model, and quarantines models
"""
