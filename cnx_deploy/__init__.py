"""ConvNeXt V2 from PyTorch to verified ONNX files and FP16 TensorRT engines.

Each stage is a plain function of the module that owns it:

- ``cnx_deploy.model``: ``create_model``, ``random_model``, ``deploy_form``
- ``cnx_deploy.model.checkpoint``: ``load_checkpoint``, ``save_checkpoint``
- ``cnx_deploy.exporters.onnx``: ``export_onnx``
- ``cnx_deploy.exporters.trt.builder``: ``build_engine``
- ``cnx_deploy.verification.parity``: ``compare``
- ``cnx_deploy.bench.timing``: ``measure_together``

This file imports nothing, so that ``cnx-deploy --help`` stays fast.
"""

__version__ = "0.1.0"
