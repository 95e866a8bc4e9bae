"""The demo: handwritten digits play faces and hands, in a tiny Stable Diffusion pipeline that ships with the
package.
"""
