"""A certificate for HTTPS that is made on the spot. Browsers warn of it once, because no authority signed it."""

import datetime
import ipaddress
import shutil
import ssl
import subprocess
import tempfile
from pathlib import Path

from se_keras.errors import first_line

_DAYS = 7


def context(host: str) -> ssl.SSLContext:
    """The settings of a server with a new certificate for an address of this computer.

    Raises:
        OSError: If there is neither the package cryptography nor the command openssl, or if openssl fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        try:
            _by_cryptography(host, key, certificate)
        except ImportError:
            _by_openssl(host, key, certificate)
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.load_cert_chain(certificate, key)
    return found


def _by_cryptography(host, key, certificate):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "se-keras benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address(host)), x509.DNSName("localhost")]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a phone's clock may be slow
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(secret, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(secret.private_bytes(encoding, form, serialization.NoEncryption()))
    certificate.write_bytes(signed.public_bytes(encoding))


def _by_openssl(host, key, certificate):
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError(
            "--https needs the command openssl or the package cryptography: pip install cryptography"
        )
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj".split()
    names = ["-addext", f"subjectAltName=IP:{host},DNS:localhost"]
    files = ["-days", str(_DAYS), "-keyout", str(key), "-out", str(certificate)]
    command = [openssl, *request, "/CN=se-keras benchmark", *names, *files]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it printed no message"])[-1]
        raise OSError(f"openssl makes no certificate: {first_line(last)}")
