"""`BACKEND=ray`: hosts on a Ray cluster, one a device, as one Serve deployment. Needs `embedyard[ray]`.

    environment     what Ray reads from the environment, set before anything imports it
    replica         the deployment's class: one host
    deploy          puts the deployment on a cluster: `embedyard ray deploy`
    request_router  Serve's choice of a replica, made by our placement
    board           what this process knows of the replicas; the way between Serve's router and the fleet
    fleet           the door: `RayFleet`
    opening         settings and registry → the backend

Nothing outside this package and `router/cli/ray_deploy.py` imports Ray.
"""

from router.backends.ray.environment import prepare_environment

prepare_environment()  # before any module of this package imports Ray, which reads the environment then
