"""Arguments of short runs."""

# Arguments of a short private run of `ZOTrainer`, for tests whose fixtures outlive those of one test.
SHORT_RUN = {
    "noise_multiplier": 1.0,
    "target_delta": 1e-4,
    "expected_batch_size": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
