"""The engines that run an artifact, one module or package each.

Which of them opens a file is chosen in vitrm.runtime.session (`open_session`).
"""
