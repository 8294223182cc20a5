# make dist && docker build --tag graftvit .
# The whole image of Python, not the slim one: torch.compile calls a C compiler.
FROM python:3.12
COPY dist/*.whl /opt/graftvit/
RUN pip install --no-cache-dir /opt/graftvit/*.whl
WORKDIR /work
ENTRYPOINT ["graftvit"]
