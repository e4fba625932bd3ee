"""Train from Python, a script or a notebook alike: the cluster starts and ends with the call.

python examples/notebook.py
"""

import dltrain

if __name__ == "__main__":
    job = dltrain.Job(
        name="from-python",
        train={"epochs": 5, "global_batch": 64},
        resources={"nodes": 2},
    )
    result = dltrain.launch(job)
    print(f"{result.status} at step {result.step}: test accuracy {result.metrics['test/accuracy']:.1%}")
    print(f"see {result.run_dir / 'report.html'}")
