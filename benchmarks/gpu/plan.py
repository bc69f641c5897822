"""Names the parts of the measurement, in their order, with the seconds that each may take.

The seconds on an H200 are estimates until one has run them: weights and graphs of a recipe 2 s, a server's start 20 s,
writing 9 GB of weights and reading them from the disk 30 s, writing
16 GB more 15 s, pinning a GB 0.5 s. Together they leave some of the ten minutes for the start and for wrong
estimates; the limits are wider, and the whole run ends on time by its budget.
"""

from benchmarks.gpu.runner import Part

BUDGET_S = 570.0
"""For all parts: a command on a lent machine has 600 s, installation included."""

PRELOAD = ("numpy", "msgspec", "torch", "transformers", "sentence_transformers", "benchmarks.gpu.runner")
"""Modules that parts share; none of them opens a CUDA context."""

_PARTS = "benchmarks.gpu.parts"

PARTS = (
    Part(
        name="kernel", entry=f"{_PARTS}.kernel:run", expected_s=15, limit_s=40, cpu_limit_s=60,
        question="does packed attention agree with float32 attention, for every head width and form?",
    ),
    Part(
        name="recipes", entry=f"{_PARTS}.recipes:run", expected_s=95, limit_s=130, cpu_limit_s=150,
        question="which path does each family take, and are its vectors right, with and without CUDA graphs?",
    ),
    Part(
        name="capture", entry=f"{_PARTS}.residence:capture", expected_s=15, limit_s=35,
        question="does recording leave a model that serves meanwhile alone?",
    ),
    Part(
        name="memory", entry=f"{_PARTS}.residence:memory", expected_s=15, limit_s=30,
        question="does a model take more memory than it is charged with?",
    ),
    Part(
        name="out-of-memory", entry=f"{_PARTS}.residence:out_of_memory", expected_s=12, limit_s=30,
        question="do the halves of a batch that does not fit run, and does the limit come back?",
    ),
    Part(
        name="cycles", entry=f"{_PARTS}.residence:cycles", expected_s=30, limit_s=50, cpu_limit_s=60,
        question="is the memory back after twenty loads and evictions?",
    ),
    Part(
        name="process", entry=f"{_PARTS}.serving:process_backend", expected_s=30, limit_s=60, cpu_limit_s=60,
        question="does BACKEND=process start?",
    ),
    Part(
        name="int8", entry=f"{_PARTS}.quantized:int8_weights", expected_s=12, limit_s=40, cpu_limit_s=60,
        question="how near do int8 weights come to bfloat16, at how many bytes and which speed?",
    ),
    Part(
        name="loading", entry=f"{_PARTS}.loading:run", expected_s=32, limit_s=70, cpu_limit_s=40,
        question="how long does a load take from the disk?",
    ),
    Part(
        name="swap", entry=f"{_PARTS}.swap:run", expected_s=48, limit_s=100, cpu_limit_s=40,
        question="how long does the answer of a parked model take, beside the copy of its bytes?",
    ),
    Part(
        name="throughput", entry=f"{_PARTS}.speed:throughput", expected_s=90, limit_s=120, cpu_limit_s=150,
        question="how many tokens a second, beside sentence-transformers?",
    ),
    Part(
        name="rerankers", entry=f"{_PARTS}.rerankers:run", expected_s=28, limit_s=60, cpu_limit_s=60,
        question="are scores right, head by head, and how many texts a second beside CrossEncoder?",
    ),
    Part(
        name="peers", entry=f"{_PARTS}.speed:peers", expected_s=1, limit_s=20, cpu_limit_s=30,
        question="how many tokens a second, beside vLLM and Infinity?",
    ),
    Part(
        name="small-calls", entry=f"{_PARTS}.speed:small_calls", expected_s=15, limit_s=40, cpu_limit_s=40,
        question="how long does a call of a few texts take in the process?",
    ),
    Part(
        name="http-latency", entry=f"{_PARTS}.serving:http_latency", expected_s=50, limit_s=90, cpu_limit_s=60,
        question="how long does a single short text take over HTTP?",
    ),
    Part(
        name="roofline", entry=f"{_PARTS}.speed:roofline", expected_s=25, limit_s=50, cpu_limit_s=40,
        question="what share of the measured matrix-product peak do passages reach?",
    ),
)  # fmt: skip
