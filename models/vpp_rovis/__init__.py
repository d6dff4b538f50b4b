"""The published Video Patch Pruning network: ViT-Adapter, Mask2Former, RO-VIS track queries; plain PyTorch."""
