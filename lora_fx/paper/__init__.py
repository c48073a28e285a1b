"""The LoRA paper (Hu et al. 2022) on one's own model: its counts and its section 7, one call or one command each.

factors      adapters, out of models and files, as A and B
subspaces    φ(A₁, A₂, i, j): how much of the directions of one adapter is in those of another (7.2, figures 3 and 4)
amplification   which directions of W an adapter amplifies, and how much (7.3, table 7)
counts       the paper's tables of trainable parameters, counted on its architectures
training_memory   its 1.2 TB → 350 GB, by `lora_fx.memory`
sweep        its tables of results, trained on two small tasks
latency      table 1: what adapters cost at inference, in ONNX Runtime
switching    another task, against reloading the model (4.2)
"""
