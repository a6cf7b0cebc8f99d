"""The files of a model that no class of transformers can say; an export copies them as they are.

They import nothing of megahybrid: whoever loads the export needs only torch and transformers.
"""
