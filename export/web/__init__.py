"""A page that runs a model in the browser, step by step: static files for any web server.

options        the page's settings
runtime_files  onnxruntime-web, in one pinned version
gallery        test images that are easy or hard for the model
page           the folder: models, runtime, images and the page itself
static/        HTML, style and scripts
"""
