"""`BACKEND=ray`: hosts on a Ray cluster, one a device, as one Serve deployment. Needs `embedyard[ray]`.

    environment        environment variables of Ray, set before anything imports it
    connection         connects to the cluster
    replica            the deployment's class: one host
    deploy             deploys to a cluster: `embedyard ray deploy`
    request_router     chooses Serve's replica by `router/backends/placement.py`
    replica_directory  snapshots of the replicas; shared by Serve's router and the fleet
    fleet              the entry point: `RayFleet`, `open_ray_backend`

Nothing outside this package and `router/bulk/ray_data.py` imports Ray.
"""

from router.backends.ray.environment import prepare_environment

prepare_environment()  # before any module of this package imports Ray, which reads the environment then
